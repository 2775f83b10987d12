// Forks: tokens of high loss, the windows that student and teacher write from the same prefix, the transport plan between them.
// `data` has { text, channel, windows, asks, size } as `forks.Forks.data` makes it.

import { clamp, define, make, number, percent, put, shape, wordOf } from "./core.js";
import { dotLine, stripPlace, walkButtons } from "./dots.js";

const SAME = 1e-9;

const mark = (real) => (real ? "◆" : "◇");
const verdictOf = (real) => (real ? "real fork" : "false alarm");

// The plan between two windows: the student's tokens down, the teacher's across, the mass as colour; same tokens are outlined.
const planMap = ({ student, teacher, same, plan }) => {
  const rows = student.length;
  const columns = teacher.length;
  const cell = clamp(Math.floor(232 / Math.max(rows, columns, 1)), 4, 24);
  const named = cell >= 11;
  const left = named ? 68 : 16;
  const top = named ? 54 : 16;
  const svg = shape("svg", {
    width: left + columns * cell + 34,
    height: top + rows * cell + 2,
    class: "opd-plan",
  });
  const write = (words, look, where) => {
    const node = put(shape("text", where), { class: look });
    node.textContent = words.length > 8 ? `${words.slice(0, 7)}…` : words;
    svg.append(node);
  };
  put(svg, {
    role: "img",
    "aria-label": `Transport plan, ${rows} of the student's tokens to ${columns} of the teacher's`,
  });
  if (named)
    student.forEach((w, i) =>
      write(w, "opd-plan-student", {
        x: left - 5,
        y: top + (i + 0.5) * cell + 4,
        "text-anchor": "end",
      }),
    );
  if (named)
    teacher.forEach((w, j) =>
      write(w, "opd-plan-teacher", {
        transform: `translate(${left + (j + 0.5) * cell + 3} ${top - 5}) rotate(-50)`,
      }),
    );
  svg.append(
    shape("rect", {
      x: left,
      y: top,
      width: columns * cell,
      height: rows * cell,
      class: "opd-plan-frame",
    }),
  );
  plan.forEach((line, i) =>
    line.forEach((mass, j) => {
      const share = Math.min(1, Math.sqrt(mass * Math.max(rows, columns)));
      if (share < 0.03) return;
      const box = shape("rect", {
        x: left + j * cell + 0.5,
        y: top + i * cell + 0.5,
        width: cell - 1,
        height: cell - 1,
        "fill-opacity": share.toFixed(2),
        class: same[i][j] ? "opd-mass opd-same" : "opd-mass",
      });
      const told = shape("title");
      told.textContent = `${student[i]} to ${teacher[j]}: ${percent(mass)}`;
      box.append(told);
      svg.append(box);
    }),
  );
  return svg;
};

define("forks", ({ box, data, state }) => {
  const { text, channel } = data;
  const size = text.index.length;
  const found = new Map(data.windows.map((w) => [w.row, w]));
  const isReal = (w) => w.distance > state.get("threshold") + SAME;
  const spoken = put(make("div", "opd-live"), { "aria-live": "polite" });
  const bar = make("div", "opd-bar opd-dots-bar");
  const key = make("div", "opd-key-line");
  const line = dotLine({
    choose: (row) => state.set("selected", row),
    move: (value) => state.set("threshold", value),
    name: "Distance above which a fork is real",
    sign: "τ",
  });
  const place = stripPlace({ text, state, fill: (strip) => strip.paint(channel) });
  const panel = make("div", "opd-panel opd-fork-panel");
  const head = make("div", "opd-fork-head");
  const both = make("div", "opd-fork-both");
  const texts = make("div", "opd-window-texts");
  const drawing = make("div", "opd-plan-box");
  const tail = make("div", "opd-goes-on");
  both.append(texts, drawing);
  panel.append(head, both);

  const markForks = () => {
    for (const [first, strip] of place.all()) {
      for (const w of found.values())
        strip.nodes[w.row - first]?.setAttribute("data-fork", mark(isReal(w)));
    }
  };
  const open = (row) => {
    const { whole, strip } = place.open(row) ?? {};
    const w = found.get(row);
    if (!whole) return;
    for (const old of place.node.querySelectorAll(".opd-window"))
      old.classList.remove("opd-window");
    if (w && !w.asked)
      strip.nodes
        .slice(row - whole.first, row - whole.first + w.student.length)
        .forEach((node) => node.classList.add("opd-window"));
    markForks();
  };

  // ── The panel ──
  const chips = (side, words, other) => {
    const node = make("div", `opd-window-row opd-of-${side}`);
    const list = make("div", "opd-chips-line");
    words.forEach((word, i) =>
      list.append(
        put(make("span", `opd-chip-word${word === other[i] ? "" : " opd-differs"}`, word), {
          dir: "auto",
        }),
      ),
    );
    node.append(make("b", "opd-side-name", side), list);
    return node;
  };
  const show = (row) => {
    if (row < 0 || row >= size) return;
    const w = found.get(row);
    const { whole } = place.open(row);
    const name = wordOf(text, text.index[row]);
    head.replaceChildren(
      make("span", "opd-word", name),
      make(
        "span",
        "opd-soft",
        `sampled at position ${row - whole.first} of completion ${whole.sample}`,
      ),
    );
    if (!w) {
      head.append(make("b", "opd-verdict", "no windows from here"));
      const how = data.asks
        ? state.live
          ? "Ask for them below."
          : "Show the view with .live() to ask for them."
        : "Underlined tokens have windows; n and p go to them.";
      texts.replaceChildren(make("div", "opd-soft", how));
      return drawing.replaceChildren();
    }
    const real = isReal(w);
    const limit = state.get("threshold");
    head.append(
      make(
        "b",
        "opd-verdict",
        `${mark(real)} ${verdictOf(real)}: distance ${number(w.distance)} ${real ? ">" : "≤"} ${number(limit)}`,
      ),
    );
    const told = real
      ? "The teacher goes elsewhere from here."
      : "The teacher goes on as the student does: the loss is high, the future alike.";
    texts.replaceChildren(
      make("div", "opd-soft", `${told} From the same prefix${w.asked ? ", both greedy" : ""}:`),
      chips("student", w.student, w.teacher),
      chips("teacher", w.teacher, w.student),
    );
    if (w.plan)
      drawing.replaceChildren(
        planMap(w),
        make(
          "div",
          "opd-soft",
          "Transport plan: the student’s tokens down, the teacher’s across; outlined where they are the same.",
        ),
      );
    else
      drawing.replaceChildren(
        make("div", "opd-soft", "The notes of the step kept no plan for this window."),
      );
  };
  const speak = (row) => {
    const w = found.get(row);
    spoken.textContent = `${wordOf(text, text.index[row])}${w ? `, ${verdictOf(isReal(w))}, distance ${number(w.distance)}` : ""}`;
  };

  // ── Asking the kernel ──
  const asking = make("div", "opd-asking");
  const answered = put(make("div", "opd-answered"), { "aria-live": "polite" });
  const request = async (button, question, act) => {
    const row = state.get("selected");
    button.disabled = true;
    try {
      act(row, await state.ask({ ...question, row }));
    } catch (error) {
      answered.replaceChildren(make("span", "", error.message));
    }
    button.disabled = false;
  };
  const offer = (words, question, act) => {
    const button = put(make("button", "opd-button opd-ask", words), { type: "button" });
    button.addEventListener("click", () => request(button, question, act));
    asking.append(button);
  };
  if (state.live && data.asks) {
    offer(
      "Write new windows here",
      { do: "windows" },
      (row, w) => (found.set(row, w), (channel.peaks = [...found.keys()]), restate(), open(row)),
    );
    for (const side of ["student", "teacher"]) {
      offer(`The ${side} goes on`, { do: "go", side }, (row, { text: more }) => {
        const line = make("div", `opd-window-row opd-of-${side}`);
        line.append(
          make("b", "opd-side-name", side),
          put(make("span", "opd-more", more), { dir: "auto" }),
        );
        answered.querySelector(`.opd-of-${side}`)?.remove();
        answered.append(line);
      });
    }
    tail.append(asking, answered);
    panel.append(tail);
  }

  // ── In step with the state ──
  const sorted = () => [...found.values()].sort((a, b) => b.distance - a.distance || a.row - b.row);
  const step = (way) => {
    const list = sorted();
    const at = list.findIndex((w) => w.row === state.get("selected"));
    if (list.length) state.set("selected", list[(at + way + list.length) % list.length].row);
  };
  const walk = walkButtons("fork", step);
  const restate = () => {
    const all = sorted();
    const real = all.filter(isReal).length;
    key.replaceChildren(
      make("span", "", `◆ ${real} real fork${real === 1 ? "" : "s"}`),
      make("span", "", `◇ ${all.length - real} false alarm${all.length - real === 1 ? "" : "s"}`),
      make("span", "opd-soft", "by transport distance of the two windows"),
      walk,
    );
    line.draw(
      all.map((w) => ({ row: w.row, value: w.distance, solid: isReal(w) })),
      state.get("selected"),
      state.get("threshold"),
    );
    markForks();
    show(state.get("selected"));
  };
  bar.append(key, line.node);
  box.append(
    ...(data.title ? [make("div", "opd-title", data.title)] : []),
    bar,
    place.node,
    panel,
    spoken,
  );
  const choose = (row) => {
    if (row < 0 || row >= size) return;
    answered.replaceChildren();
    open(row);
    restate();
    speak(row);
  };
  state.on("selected", choose);
  state.on("threshold", restate);
  const watch = new ResizeObserver(
    () => line.node.clientWidth && Math.abs(line.node.clientWidth - line.width()) > 1 && restate(),
  );
  watch.observe(line.node);
  if (state.get("selected") < 0) state.set("selected", sorted()[0]?.row ?? 0);
  open(state.get("selected"));
  restate();
  return () => watch.disconnect();
});
