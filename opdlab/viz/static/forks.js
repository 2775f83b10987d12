// Forks: tokens of high loss, the windows that student and teacher write from the same prefix, the
// transport plan between them.

/** @import { ForksPayload, ForkWindow, State } from "./types.js" */

import {
  clamp,
  completionAt,
  define,
  liveRegion,
  make,
  makeBar,
  makeButton,
  number,
  percent,
  put,
  shape,
  svgText,
  titleOf,
  watchWidth,
  wordAt,
} from "./core.js";
import { dotLine, stripPlace, walkButtons } from "./dots.js";
import { nodesOf } from "./strip.js";

const ROUNDING = 1e-9; // a distance must pass the threshold by more than this
const PLAN_SIZE = 232; // px of a transport plan
const WORD_LENGTH = 8; // letters of a word beside a plan
const PLAN_TOLD =
  "Transport plan: the student’s tokens down, the teacher’s across; outlined where they are the same.";

// ── Model ────────────────────────────────────────────────────────────────────────────────────────

/** @param {boolean} isReal */
const signOf = (isReal) => (isReal ? "◆" : "◇");
/** @param {boolean} isReal */
const verdictOf = (isReal) => (isReal ? "real fork" : "false alarm");
/** @param {number} count @param {string} noun */
const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

/**
 * The windows by row. Windows may be added, of a live page.
 * @param {ForksPayload} data
 * @param {State} state
 */
const windowsOf = ({ windows }, state) => {
  const byRow = new Map(windows.map((one) => [one.row, one]));
  /** @param {ForkWindow} one */
  const isReal = ({ distance }) => distance > state.get("threshold") + ROUNDING;
  const byDistance = () =>
    [...byRow.values()].sort((a, b) => b.distance - a.distance || a.row - b.row);
  return { byRow, isReal, byDistance };
};

/** @typedef {ReturnType<typeof windowsOf>} Windows */

// ── The transport plan ───────────────────────────────────────────────────────────────────────────

/** @param {string} word */
const shortened = (word) =>
  word.length > WORD_LENGTH ? `${word.slice(0, WORD_LENGTH - 1)}…` : word;

/**
 * Draw the cells of a plan: the mass as colour, the same tokens outlined.
 * @param {ForkWindow} window
 * @param {number[][]} plan
 * @param {(i: number, j: number) => Record<string, number>} boxOf
 */
const planCells = ({ student, teacher, same }, plan, boxOf) => {
  const most = Math.max(student.length, teacher.length);
  return plan.flatMap((line, i) =>
    line.flatMap((mass, j) => {
      const share = Math.min(1, Math.sqrt(mass * most));
      if (share < 0.03) return [];
      const look = same[i][j] ? "opd-mass opd-same" : "opd-mass";
      const cell = shape("rect", {
        ...boxOf(i, j),
        "fill-opacity": share.toFixed(2),
        class: look,
      });
      const words = `${student[i]} to ${teacher[j]}: ${percent(mass)}`;
      cell.appendChild(shape("title")).textContent = words;
      return [cell];
    }),
  );
};

/**
 * Draw the plan between two windows: the student's tokens down, the teacher's across.
 * @param {ForkWindow} window
 * @param {number[][]} plan
 */
const planMap = (window, plan) => {
  const { student, teacher } = window;
  const [rows, columns] = [student.length, teacher.length];
  const size = clamp(Math.floor(PLAN_SIZE / Math.max(rows, columns, 1)), 4, 24);
  const isNamed = size >= 11; // px that a word needs
  const left = isNamed ? 68 : 16;
  const top = isNamed ? 54 : 16;
  const svg = shape("svg", {
    width: left + columns * size + 34,
    height: top + rows * size + 2,
    class: "opd-plan",
    role: "img",
    "aria-label": `Transport plan, ${rows} of the student's tokens to ${columns} of the teacher's`,
  });
  const names = [
    ...student.map((word, i) =>
      svgText(shortened(word), {
        x: left - 5,
        y: top + (i + 0.5) * size + 4,
        "text-anchor": "end",
        class: "opd-plan-student",
      }),
    ),
    ...teacher.map((word, j) =>
      svgText(shortened(word), {
        transform: `translate(${left + (j + 0.5) * size + 3} ${top - 5}) rotate(-50)`,
        class: "opd-plan-teacher",
      }),
    ),
  ];
  const frame = { x: left, y: top, width: columns * size, height: rows * size };
  const cells = planCells(window, plan, (i, j) => ({
    x: left + j * size + 0.5,
    y: top + i * size + 0.5,
    width: size - 1,
    height: size - 1,
  }));
  svg.append(...(isNamed ? names : []), shape("rect", { ...frame, class: "opd-plan-frame" }));
  svg.append(...cells);
  return svg;
};

// ── The panel of one token ───────────────────────────────────────────────────────────────────────

/** @param {string} side @param {string[]} words @param {string[]} other words of the other side */
const windowRow = (side, words, other) => {
  const node = make("div", `opd-window-row opd-of-${side}`);
  const list = make("div", "opd-chips-line");
  words.forEach((word, i) => {
    const look = word === other[i] ? "opd-chip-word" : "opd-chip-word opd-differs";
    list.append(put(make("span", look, word), { dir: "auto" }));
  });
  node.append(make("b", "opd-side-name", side), list);
  return node;
};

/** @param {ForksPayload} data @param {State} state @param {Windows} windows */
const forkPanel = ({ text, asks }, state, { byRow, isReal }) => {
  const node = make("div", "opd-panel opd-fork-panel");
  const head = make("div", "opd-fork-head");
  const both = make("div", "opd-fork-both");
  const texts = make("div", "opd-window-texts");
  const drawing = make("div", "opd-plan-box");
  both.append(texts, drawing);
  node.append(head, both);
  const howToAsk = () => {
    if (!asks) return "Underlined tokens have windows; n and p go to them.";
    return state.live ? "Ask for them below." : "Show the view with .live() to ask for them.";
  };
  const showNone = () => {
    head.append(make("b", "opd-verdict", "no windows from here"));
    texts.replaceChildren(make("div", "opd-soft", howToAsk()));
    drawing.replaceChildren();
  };
  /** @param {ForkWindow} window */
  const showWindow = (window) => {
    const { student, teacher, distance, plan, asked } = window;
    const real = isReal(window);
    const compared = `${number(distance)} ${real ? ">" : "≤"} ${number(state.get("threshold"))}`;
    const verdict = `${signOf(real)} ${verdictOf(real)}: distance ${compared}`;
    head.append(make("b", "opd-verdict", verdict));
    const told = real
      ? "The teacher goes elsewhere from here."
      : "The teacher goes on as the student does: the loss is high, the future alike.";
    const source = `From the same prefix${asked ? ", both greedy" : ""}:`;
    texts.replaceChildren(
      make("div", "opd-soft", `${told} ${source}`),
      windowRow("student", student, teacher),
      windowRow("teacher", teacher, student),
    );
    const words = plan ? PLAN_TOLD : "The notes of the step kept no plan for this window.";
    drawing.replaceChildren(
      ...(plan ? [planMap(window, plan)] : []),
      make("div", "opd-soft", words),
    );
  };
  /** @param {number} row */
  const show = (row) => {
    const completion = completionAt(text, row);
    if (!completion) return;
    const { first, sample } = completion;
    const place = `sampled at position ${row - first} of completion ${sample}`;
    head.replaceChildren(
      make("span", "opd-word", wordAt(text, row)),
      make("span", "opd-soft", place),
    );
    const window = byRow.get(row);
    if (window) showWindow(window);
    else showNone();
  };
  return { node, show };
};

// ── Asking Python ────────────────────────────────────────────────────────────────────────────────

/**
 * Make the buttons of a live page that ask Python to write from the chosen token.
 * @param {State} state
 * @param {(row: number, window: ForkWindow) => void} add hears of new windows
 */
const askingPanel = (state, add) => {
  const node = make("div", "opd-goes-on");
  const asking = make("div", "opd-asking");
  const answered = put(make("div", "opd-answered"), { "aria-live": "polite" });
  /** @param {string} words @param {object} question @param {(row: number, answer: any) => void} act */
  const offer = (words, question, act) => {
    const ask = makeButton("opd-ask", words);
    ask.addEventListener("click", async () => {
      const row = state.get("selected");
      ask.disabled = true;
      try {
        act(row, await state.ask({ ...question, row }));
      } catch (error) {
        const message = error instanceof Error ? error.message : String(error);
        answered.replaceChildren(make("span", "", message));
      }
      ask.disabled = false;
    });
    asking.append(ask);
  };
  offer("Write new windows here", { do: "windows" }, add);
  for (const side of ["student", "teacher"]) {
    offer(`The ${side} goes on`, { do: "go", side }, (_, { text }) => {
      const line = make("div", `opd-window-row opd-of-${side}`);
      const words = put(make("span", "opd-more", text), { dir: "auto" });
      line.append(make("b", "opd-side-name", side), words);
      answered.querySelector(`.opd-of-${side}`)?.remove();
      answered.append(line);
    });
  }
  node.append(asking, answered);
  return { node, clear: () => answered.replaceChildren() };
};

// ── The view ─────────────────────────────────────────────────────────────────────────────────────

/**
 * The line above: how many forks are real, and the buttons that go through all by distance.
 * @param {State} state
 * @param {Windows} windows
 */
const headLine = (state, { isReal, byDistance }) => {
  const node = make("div", "opd-key-line");
  const walk = walkButtons("fork", (step) => {
    const all = byDistance();
    const at = all.findIndex(({ row }) => row === state.get("selected"));
    if (all.length) state.set("selected", all[(at + step + all.length) % all.length].row);
  });
  const draw = () => {
    const all = byDistance();
    const real = all.filter(isReal).length;
    node.replaceChildren(
      make("span", "", `◆ ${plural(real, "real fork")}`),
      make("span", "", `◇ ${plural(all.length - real, "false alarm")}`),
      make("span", "opd-soft", "by transport distance of the two windows"),
      walk,
    );
  };
  return { node, draw };
};

/**
 * Make the strip, in which tokens with windows are marked and the chosen one's window is shown.
 * @param {ForksPayload} data
 * @param {State} state
 * @param {Windows} windows
 */
const forkStrip = ({ text, channel }, state, { byRow, isReal }) => {
  const place = stripPlace({ text, state, fill: (strip) => strip.paint(channel) });
  const markForks = () => {
    for (const { nodes, first } of place.all()) {
      for (const window of byRow.values()) {
        nodes[window.row - first]?.setAttribute("data-fork", signOf(isReal(window)));
      }
    }
  };
  /** @param {number} row */
  const open = (row) => {
    const strip = place.open(row)?.strip;
    if (!strip) return;
    for (const old of place.node.querySelectorAll(".opd-window"))
      old.classList.remove("opd-window");
    const window = byRow.get(row);
    markForks();
    if (!window || window.asked) return; // its tokens are not those of the text
    for (const token of nodesOf(strip, row, row + window.student.length)) {
      token.classList.add("opd-window");
    }
  };
  return { node: place.node, open, markForks };
};

define("forks", ({ box, data, state }) => {
  const { text, channel } = data;
  const windows = windowsOf(data, state);
  const { byRow, isReal, byDistance } = windows;
  const spoken = liveRegion();
  const line = dotLine({
    choose: (row) => state.set("selected", row),
    move: (value) => state.set("threshold", value),
    name: "Distance above which a fork is real",
    sign: "τ",
  });
  const head = headLine(state, windows);
  const strip = forkStrip(data, state, windows);
  const panel = forkPanel(data, state, windows);

  const redraw = () => {
    const dots = byDistance().map((one) => ({
      row: one.row,
      value: one.distance,
      solid: isReal(one),
    }));
    head.draw();
    line.draw(dots, state.get("selected"), state.get("threshold"));
    strip.markForks();
    panel.show(state.get("selected"));
  };
  const asking = askingPanel(state, (row, window) => {
    byRow.set(row, window);
    channel.peaks = [...byRow.keys()]; // the strip reads them when n or p is pressed
    redraw();
    strip.open(row);
  });
  if (state.live && data.asks) panel.node.append(asking.node);
  /** @param {number} row */
  const choose = (row) => {
    if (row < 0 || row >= text.index.length) return;
    asking.clear();
    strip.open(row);
    redraw();
    const window = byRow.get(row);
    const verdict = window && `${verdictOf(isReal(window))}, distance ${number(window.distance)}`;
    spoken.textContent = [wordAt(text, row), verdict].filter(Boolean).join(", ");
  };

  const bar = makeBar(head.node, line.node);
  bar.classList.add("opd-dots-bar");
  box.append(...titleOf(data), bar, strip.node, panel.node, spoken);
  state.on("selected", choose);
  state.on("threshold", redraw);
  if (state.get("selected") < 0) state.set("selected", byDistance()[0]?.row ?? 0);
  strip.open(state.get("selected"));
  redraw();
  return watchWidth(line.node, line.width, redraw);
});
