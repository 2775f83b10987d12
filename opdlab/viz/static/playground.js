// Playground: curves, a triangle and two hills for each loss shown. Built-in losses are computed here (toys.js), own ones by Python.

import { clamp, define, make, number, percent, put, shape } from "./core.js";
import { duelIndex } from "./duel.js";
import { linePlot } from "./lines.js";
import {
  RATIOS,
  SPACE,
  START,
  bell,
  fieldOf,
  fitHills,
  hillsOf,
  logSoftmax,
  pullsOf,
  pushOf,
  students,
  tempered,
  walkOf,
} from "./toys.js";
import { equal } from "./state.js";
import { tokenStrip } from "./strip.js";

const CORNERS = [
  [6, 80],
  [94, 80],
  [50, 6],
];
const OUTCOMES = ["a", "b", "c"];

define("playground", ({ box, data, state }) => {
  const T = {
    RATIOS,
    SPACE,
    START,
    bell,
    fieldOf,
    fitOf: fitHills,
    hillsOf,
    logSoftmax,
    pullsOf,
    pushOf,
    students,
    tempered,
    walkOf,
  };
  const own = new Map(data.own.map((o) => [o.name, o]));
  const known = new Map(data.known);
  const names = [...known.keys(), ...own.keys()];
  const label = (name) =>
    own.has(name)
      ? `${name} (yours)`
      : name.replaceAll("_", " ").replace("kl", "KL").replace("jsd", "JSD");
  const settings = () =>
    Object.fromEntries(Object.keys(data.settings).map((name) => [name, state.get(name)]));
  const stale = () => !equal(settings(), asked);
  let asked = data.settings;
  let timer = 0;
  let columns = [];

  const three = (flat) =>
    Array.from({ length: flat.length / 3 }, (_, i) => [...flat.slice(3 * i, 3 * i + 3)]);
  const numbersOf = (values) => Float64Array.from(values, (v) => v ?? NaN);
  // The longest sum: kept, since dragging in the triangle does not move it.
  const kept = new Map();
  const fitOf = (push, steps, temperature) => {
    const key = JSON.stringify([
      push.name,
      state.get("parameter"),
      state.get("clip"),
      steps,
      temperature,
    ]);
    if (!kept.has(key)) kept.set(key, T.fitOf(push, steps, temperature));
    return kept.get(key);
  };
  // Everything that is drawn of one loss, whoever computed it.
  const found = (name) => {
    const o = own.get(name);
    const s = settings();
    if (o)
      return {
        weights: numbersOf(o.weights),
        pulls: numbersOf(o.pulls),
        field: three(o.field),
        walk: three(o.walk),
        fit: o.fit,
      };
    const push = T.pushOf(name, state.get("parameter"), state.get("clip"));
    return {
      weights: T.RATIOS.map((x) => push.weight(x)),
      pulls: T.pullsOf(push, s.mass),
      field: T.fieldOf(push, s.teacher, s.temperature),
      walk: T.walkOf(push, s.student, s.teacher, s.steps, s.temperature),
      fit: fitOf(push, s.steps, s.temperature),
    };
  };

  // ── Which losses, and the knobs ──
  const chips = put(make("div", "opd-buttons"), { role: "group", "aria-label": "Losses shown" });
  const losses = make("div", "opd-losses");
  for (const name of names) {
    const chip = put(make("button", "opd-button opd-lp-key", label(name)), {
      type: "button",
      "data-loss": name,
    });
    chip.addEventListener("click", () => {
      const shown = state.get("shown");
      state.set(
        "shown",
        shown.includes(name)
          ? shown.filter((n) => n !== name)
          : [...shown, name].slice(-data.hues.length),
      );
    });
    chips.append(chip);
  }
  losses.append(chips);
  const knobs = make("div", "opd-knobs");
  const dials = [];
  const knob = (name, title, low, high, step, say) => {
    const holder = make("label", "opd-knob", title);
    const input = put(make("input"), { type: "range", min: low, max: high, step });
    const out = make("output");
    input.addEventListener("input", () => state.set(name, Number(input.value)));
    holder.append(input, out);
    knobs.append(holder);
    dials.push(() => ((input.value = state.get(name)), (out.textContent = say(state.get(name)))));
  };
  knob("parameter", "β or α", 0.05, 0.95, 0.05, number);
  knob("clip", "clip the push at", 0, 6, 0.25, (v) => (v ? `± ${number(v)}` : "off"));
  knob("temperature", "teacher's temperature", 0.3, 3, 0.1, number);
  knob("mass", "teacher gives the token", 0.05, 0.95, 0.05, (v) => `${Math.round(100 * v)} %`);
  knob("steps", "steps taken", 0, 400, 10, String);

  // ── Curves over the log ratio ──
  const curves = make("div", "opd-curves");
  const ends = "student over-confident ↔ teacher prefers";
  const curve = (key, title, tall, results) =>
    linePlot({
      key,
      label: title,
      told: ends,
      x: [-6, 6],
      y: [-tall, tall],
      marks: [],
      lines: results.map(([name, r], i) => ({
        name,
        look: data.hues[i],
        kind: "line",
        x: T.RATIOS,
        y: r[key].map((v) => (Math.abs(v) > tall ? NaN : v)),
      })),
    }).node;

  // ── The triangle: a field of arrows, the way of one student, two dots to drag ──
  const spot = (p) => [0, 1].map((d) => p.reduce((sum, v, k) => sum + v * CORNERS[k][d], 0));
  const onto = ([x, y]) => {
    // the nearest point of the triangle's inside
    const c = clamp((80 - y) / 74, 0, 1);
    const b = clamp((x - 6 - 44 * c) / 88, 0, 1 - c);
    const raw = [1 - b - c, b, c].map((v) => Math.max(v, 0.02));
    return raw.map((v) => v / raw.reduce((s, w) => s + w, 0));
  };
  const KEYS = { ArrowLeft: 0, ArrowRight: 1, ArrowUp: 2 };
  const nudge = (p, key) => {
    const k = KEYS[key];
    const to =
      key === "ArrowDown"
        ? p.map((v, i) => (i === 2 ? v - 0.03 : v + 0.015))
        : p.map((v, i) => v + (i === k ? 0.03 : -0.015));
    const kept = to.map((v) => Math.max(v, 0.02));
    return kept.map((v) => v / kept.reduce((s, w) => s + w, 0));
  };
  const triangle = (name) => {
    const svg = put(shape("svg", { class: "opd-tri", viewBox: "0 0 100 88" }), {
      role: "group",
      "aria-label": `Where ${label(name)} moves a student of three outcomes`,
    });
    const arrows = shape("path", { class: "opd-arrows" });
    const walk = shape("path", { class: "opd-walk" });
    const ghost = shape("circle", { class: "opd-ghost", r: 2.4 });
    svg.append(
      shape("path", {
        class: "opd-side-line",
        d: `M${CORNERS.map((c) => c.join(" ")).join("L")}Z`,
      }),
      arrows,
      walk,
      ghost,
    );
    CORNERS.forEach(([x, y], k) => {
      const text = shape("text", { x, y: k === 2 ? y - 2 : y + 6, "text-anchor": "middle" });
      text.textContent = OUTCOMES[k];
      svg.append(text);
    });
    const dots = ["teacher", "student"].map((who) => {
      const dot = put(shape("circle", { class: `opd-dot opd-dot-${who}`, r: 3, tabindex: 0 }), {
        role: "button",
      });
      const drag = (event) => {
        const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(
          svg.getScreenCTM().inverse(),
        );
        state.set(who, onto([at.x, at.y]));
      };
      dot.addEventListener(
        "pointerdown",
        (event) => (dot.setPointerCapture(event.pointerId), event.preventDefault(), dot.focus()),
      );
      dot.addEventListener(
        "pointermove",
        (event) => dot.hasPointerCapture(event.pointerId) && drag(event),
      );
      dot.addEventListener("keydown", (event) => {
        if (!(event.key in KEYS) && event.key !== "ArrowDown") return;
        event.preventDefault();
        state.set(who, nudge(state.get(who), event.key));
      });
      svg.append(dot);
      return { who, dot };
    });
    const points = T.students();
    const update = ({ field, walk: way }) => {
      const moves = field.map((v) =>
        [0, 1].map((d) => v.reduce((sum, x, k) => sum + x * CORNERS[k][d], 0)),
      );
      const most = Math.max(...moves.map((m) => Math.hypot(...m))) || 1;
      arrows.setAttribute(
        "d",
        points
          .map((p, i) => {
            const [x, y] = spot(p);
            const size = Math.hypot(...moves[i]);
            const length = 6.5 * Math.sqrt(size / most);
            const [ux, uy] = moves[i].map((v) => v / (size || 1));
            const [ex, ey] = [x + length * ux, y + length * uy];
            const head = Math.min(1.6, length / 2);
            const wing = (s) =>
              `M${ex.toFixed(2)} ${ey.toFixed(2)}l${(head * (-ux + s * 0.6 * uy)).toFixed(2)} ${(head * (-uy - s * 0.6 * ux)).toFixed(2)}`;
            return length < 0.4
              ? ""
              : `M${x.toFixed(2)} ${y.toFixed(2)}L${ex.toFixed(2)} ${ey.toFixed(2)}${wing(1)}${wing(-1)}`;
          })
          .join(""),
      );
      walk.setAttribute(
        "d",
        `M${way
          .map((p) =>
            spot(p)
              .map((v) => v.toFixed(2))
              .join(" "),
          )
          .join("L")}`,
      );
      const cold = T.tempered(state.get("teacher").map(Math.log), state.get("temperature")).map(
        Math.exp,
      );
      const [gx, gy] = spot(cold);
      put(ghost, { cx: gx, cy: gy });
      for (const { who, dot } of dots) {
        const p = state.get(who);
        const [cx, cy] = spot(p);
        put(dot, {
          cx,
          cy,
          "aria-label": `${who} at ${p.map((v, k) => `${OUTCOMES[k]} ${Math.round(100 * v)} %`).join(", ")}; arrow keys move it`,
        });
      }
    };
    return { node: svg, update };
  };

  // ── Two hills and one Gaussian ──
  const fitted = ({ fit: [at, width] }) => {
    const density = (logits) => T.logSoftmax(logits).map(Math.exp);
    const hills = density(T.hillsOf(state.get("temperature")));
    const x = T.SPACE;
    const p = density(T.bell(at, width));
    const left = p.reduce((sum, v, k) => sum + (x[k] < 0.1 ? v : 0), 0);
    const start = density(T.bell(...T.START));
    const top = Math.max(...hills, ...p, ...start) * 1.05;
    const line = (look, kind, y) => ({ name: look, look, kind, x, y: Float64Array.from(y) });
    const lines = [
      line("student", "faint", start),
      line("teacher", "line", hills),
      line("student", "line", p),
    ];
    const seen =
      Math.min(left, 1 - left) > data.alone
        ? "covers both hills"
        : `sits on the ${left > 0.5 ? "left" : "right"} hill`;
    const plot = linePlot({
      label: seen,
      told: `centre ${number(at)}, width ${number(width)}`,
      x: [-6, 6],
      y: [0, top],
      marks: [],
      lines,
    });
    plot.node.classList.add("opd-hills");
    return plot.node;
  };

  const worlds = make("div", "opd-worlds");
  const signs = make("div", "opd-signs");
  for (const [look, text] of [
    ["teacher", "teacher: a dot to drag, two hills; a ring where its temperature puts it"],
    ["student", "student: a dot to drag, its way in the steps taken; a Gaussian, thin before them"],
  ]) {
    signs.append(make("span", `opd-lp-key opd-l-${look}`, text));
  }
  const column = (name, hue) => {
    const node = make("div", "opd-world");
    const head = make("h4");
    const tri = triangle(name);
    const hills = make("div");
    const note = make("div", "opd-stale");
    head.append(make("span", `opd-lp-key opd-l-${hue}`, label(name)));
    node.append(head, tri.node, hills, note);
    const update = (r) => {
      tri.update(r);
      hills.replaceChildren(fitted(r));
      note.textContent =
        own.has(name) && stale()
          ? state.live
            ? "Python computes …"
            : "at the settings of the saved page; move it with .live()"
          : "";
    };
    return { name, node, update };
  };

  // ── Own losses: what the audit says ──
  const card = ({ name, verdict, flags, check, held, rows }) => {
    const node = make("div", "opd-card");
    const list = make("ul");
    const table = make("table");
    const head = make("tr");
    for (const [flag, said] of [...flags, ...(held ? [["finite differences", check]] : [])]) {
      const line = make("li");
      line.append(make("b", "", flag), `: ${said}`);
      list.append(line);
    }
    for (const title of ["divergence", "to", "cosine", "length"])
      head.append(put(make("th", "", title), { scope: "col" }));
    table.append(head);
    for (const [divergence, target, cosine, ratio] of rows) {
      const row = make("tr");
      row.append(
        ...[divergence, target, number(cosine, true), `× ${number(ratio)}`].map((text) =>
          make("td", "", text),
        ),
      );
      table.append(row);
    }
    node.append(
      make("h4", "", `audit of ${name}`),
      make("b", "", verdict),
      ...(list.children.length ? [list] : []),
      ...(held ? [] : [make("div", "opd-soft", check)]),
      table,
    );
    return node;
  };

  // ── A token of a trace ──
  const panel = make("div", "opd-panel");
  const rival = data.policies?.find((name) => name !== "student");
  const index = data.duel && duelIndex(data.duel);
  const most = data.duel ? Math.max(...data.duel.count) + 1 : 0;
  const tokenPanel = (row) => {
    if (!data.duel || !rival || row < 0 || row >= data.text.index.length) return;
    const { count, p, other, names: words, row: at } = data.duel;
    const n = count[row];
    const start = index.start[row];
    const place = index.place[row];
    const listed = Array.from({ length: n }, (_, k) => [
      words[at[start + k]],
      p.student[start + k],
      p[rival][start + k],
    ]);
    if (n) listed.push(["all others", other.student[place], other[rival][place]]);
    const built = state.get("shown").filter((name) => !own.has(name));
    const floor = (v) => Math.log(Math.max(v, 1e-7));
    const moves = built.map((name) =>
      T.pushOf(name, state.get("parameter"), state.get("clip")).gradient(
        listed.map((l) => floor(l[1])),
        T.logSoftmax(listed.map((l) => floor(l[2]))),
      ),
    );
    const line = (look, cells) => {
      const node = make("div", `opd-token-row ${look}`);
      node.style.setProperty("--n", Math.max(1, built.length));
      node.append(...cells);
      return node;
    };
    const swing = (value) => {
      const track = put(make("span", "opd-swing"), { title: number(value, true) });
      const bar = put(make("i"), { [value > 0 ? "data-up" : "data-down"]: "" });
      bar.style.width = `${50 * Math.sqrt(Math.min(1, Math.abs(value)))}%`;
      track.append(bar);
      return track;
    };
    const rows = listed.map(([word, s, t], k) =>
      line("", [
        make("span", "opd-word", word),
        make("span", "opd-p", percent(s)),
        make("span", "opd-p", percent(t)),
        ...moves.map((m) => swing(m[k])),
      ]),
    );
    const head = line("opd-token-head", [
      make("span", "", `position ${row}`),
      make("span", "", "student"),
      make("span", "", rival),
      ...built.map((name) => make("span", "", label(name))),
    ]);
    if (!n) rows.push(line("", [make("span", "opd-soft", "no room")]));
    while (rows.length < most) rows.push(line("", [])); // as high as ever, or the page would jump under the pointer
    panel.replaceChildren(
      head,
      ...rows,
      make(
        "div",
        "opd-soft",
        "Push on each token's logit: bars on a √ scale, full at 1; blue up, orange down.",
      ),
    );
  };

  // ── Drawing ──
  const draw = () => {
    const results = state.get("shown").map((name) => [name, found(name)]);
    const tall = Math.max(
      0.25,
      ...results
        .flatMap(([, r]) => [...r.pulls])
        .filter(Number.isFinite)
        .map(Math.abs),
    );
    curves.replaceChildren(
      curve("weights", "push per unit of probability", data.tall, results),
      curve("pulls", "push on the token's logit", Math.min(tall, 1), results),
    );
    results.forEach(([name, r], i) => columns[i]?.name === name && columns[i].update(r));
    tokenPanel(state.get("selected"));
  };
  const rebuild = () => {
    const shown = state.get("shown");
    for (const chip of chips.children) {
      const i = shown.indexOf(chip.dataset.loss);
      chip.setAttribute("aria-pressed", i >= 0);
      chip.className = `opd-button opd-lp-key ${i < 0 ? "" : `opd-l-${data.hues[i]}`}`;
    }
    columns = shown.map((name, i) => column(name, data.hues[i]));
    worlds.replaceChildren(...columns.map(({ node }) => node));
    draw();
  };
  const compute = async () => {
    const at = settings();
    const results = await state.ask(at);
    for (const result of results) own.set(result.name, result);
    asked = at;
    draw();
  };
  let frame = 0;
  const moved = () => {
    for (const set of dials) set();
    frame ||= requestAnimationFrame(() => ((frame = 0), draw()));
    if (!state.live || !own.size || !stale()) return;
    clearTimeout(timer);
    timer = setTimeout(compute, 250);
  };

  box.append(
    ...(data.title ? [make("div", "opd-title", data.title)] : []),
    losses,
    knobs,
    curves,
    signs,
    worlds,
    ...data.cards.map(card),
  );
  if (data.text && data.duel) {
    const strip = tokenStrip({ text: data.text, state, label: "Tokens to push" });
    strip.paint({
      key: "none",
      label: "",
      unit: "",
      kind: "amount",
      limit: 1,
      less: "",
      more: "",
      names: [],
      marks: [],
      values: new Float32Array(data.text.index.length),
      peaks: [],
    });
    box.append(strip.node, panel);
  }
  for (const name of ["parameter", "clip", "temperature", "mass", "steps", "teacher", "student"])
    state.on(name, moved);
  state.on("shown", rebuild);
  state.on("selected", tokenPanel);
  state.on("hovered", (row) => tokenPanel(row < 0 ? state.get("selected") : row));
  for (const set of dials) set();
  rebuild();
  return () => (clearTimeout(timer), cancelAnimationFrame(frame));
});
