// Playground: curves, a triangle and two hills for each loss shown. Built-in losses are computed
// here (toys.js), all others by Python.

/** @import { Duel, LossCard, OwnLoss, PlaygroundPayload, State, Text, WorldSettings } from "./types.js" */

import { define, make, makeButton, number, percent, put, titleOf } from "./core.js";
import { duelIndex } from "./duel.js";
import { linePlot } from "./lines.js";
import { trianglePlot } from "./playground_triangle.js";
import { equal } from "./state.js";
import { tokenStrip } from "./strip.js";
import {
  bell,
  fieldOf,
  fitHills,
  hillsOf,
  logSoftmax,
  pullsOf,
  pushOf,
  RATIOS,
  SPACE,
  START,
  walkOf,
} from "./toys.js";

/**
 * What is drawn of one loss, whoever computed it.
 * @typedef {object} LossResult
 * @property {number[]} weights at each of RATIOS
 * @property {number[]} pulls at each of RATIOS
 * @property {number[][]} field of the triangle's students
 * @property {number[][]} walk of the one student
 * @property {[centre: number, width: number]} fit
 */

const ENDS = "student over-confident ↔ teacher prefers";
const PATIENCE = 250; // ms after the last change until Python is asked
const LEAST_SHARE = 1e-7; // of a token, for logs

// ── Model ────────────────────────────────────────────────────────────────────────────────────────

/** @param {number[]} flat three numbers per point @returns {number[][]} */
const inThrees = (flat) =>
  Array.from({ length: flat.length / 3 }, (_, i) => [...flat.slice(3 * i, 3 * i + 3)]);

/** @param {OwnLoss} own @returns {LossResult} */
const resultOfOwn = ({ weights, pulls, field, walk, fit }) => ({
  weights: Array.from(weights, (weight) => weight ?? NaN),
  pulls: Array.from(pulls, (pull) => pull ?? NaN),
  field: inThrees(field),
  walk: inThrees(walk),
  fit,
});

/**
 * The losses: built-in ones at the present settings, own ones as Python computed them last.
 * @param {PlaygroundPayload} data
 * @param {State} state
 */
const lossesOf = (data, state) => {
  const own = new Map(data.own.map((loss) => [loss.name, loss]));
  let asked = data.settings; // the settings of the own ones
  const settings = () => ({
    mass: state.get("mass"),
    temperature: state.get("temperature"),
    steps: state.get("steps"),
    teacher: state.get("teacher"),
    student: state.get("student"),
  });
  /** @param {string} name */
  const push = (name) => pushOf(name, state.get("parameter"), state.get("clip"));
  // The longest computation is kept, since dragging in the triangle does not change it.
  /** @type {Map<string, [centre: number, width: number]>} */
  const fits = new Map();
  /** @param {string} name @param {WorldSettings} at */
  const fitOf = (name, { steps, temperature }) => {
    const key = [name, state.get("parameter"), state.get("clip"), steps, temperature].join();
    const fit = fits.get(key) ?? fitHills(push(name), steps, temperature);
    fits.set(key, fit);
    return fit;
  };
  /** @param {string} name @returns {LossResult} */
  const resultOf = (name) => {
    const mine = own.get(name);
    if (mine) return resultOfOwn(mine);
    const at = settings();
    const { mass, temperature, steps, teacher, student } = at;
    const built = push(name);
    return {
      weights: RATIOS.map(built.weight),
      pulls: pullsOf(built, mass),
      field: fieldOf(built, teacher, temperature),
      walk: walkOf(built, student, teacher, steps, temperature),
      fit: fitOf(name, at),
    };
  };
  const askPython = async () => {
    const at = settings();
    /** @type {OwnLoss[]} */
    const results = await state.ask(at);
    for (const result of results) own.set(result.name, result);
    asked = at;
  };
  return {
    names: [...data.known.map(([name]) => name), ...own.keys()],
    /** @param {string} name */
    isOwn: (name) => own.has(name),
    hasOwn: own.size > 0,
    // Python sorts and names settings as `data.settings` has them.
    isStale: () => !equal(pick(settings(), data.settings), pick(asked, data.settings)),
    push,
    resultOf,
    askPython,
    /** @param {string} name */
    labelOf: (name) => {
      if (own.get(name)?.mine) return `${name} (yours)`;
      return name.replaceAll("_", " ").replace("kl", "KL").replace("jsd", "JSD");
    },
  };
};

/** @param {Record<string, any>} values @param {object} order */
const pick = (values, order) => Object.keys(order).map((name) => values[name]);

/** @typedef {ReturnType<typeof lossesOf>} Losses */

/**
 * Return the candidates at a token as [word, student's share, rival's share], all others last.
 * @param {Duel} duel
 * @param {{ start: Uint32Array, place: Uint32Array }} index
 * @param {string} rival
 * @param {number} row
 * @returns {[word: string, student: number, rival: number][]}
 */
const candidatesAt = ({ count, p, other, names, row: entries }, index, rival, row) => {
  const start = index.start[row];
  const place = index.place[row];
  /** @type {[string, number, number][]} */
  const listed = Array.from({ length: count[row] }, (_, k) => [
    names[entries[start + k]],
    p.student[start + k],
    p[rival][start + k],
  ]);
  if (listed.length) listed.push(["all others", other.student[place], other[rival][place]]);
  return listed;
};

// ── Which losses, and the knobs ──────────────────────────────────────────────────────────────────

/** @param {PlaygroundPayload} data @param {State} state @param {Losses} losses */
const lossButtons = ({ hues }, state, { names, labelOf }) => {
  const holder = make("div", "opd-losses");
  const node = put(make("div", "opd-buttons"), { role: "group", "aria-label": "Losses shown" });
  holder.append(node);
  const buttons = names.map((name) => {
    const choose = put(makeButton("opd-lp-key", labelOf(name)), { "data-loss": name });
    choose.addEventListener("click", () => {
      const shown = state.get("shown");
      const others = shown.filter((other) => other !== name);
      state.set("shown", shown.includes(name) ? others : [...shown, name].slice(-hues.length));
    });
    node.append(choose);
    return { name, choose };
  });
  const show = () => {
    for (const { name, choose } of buttons) {
      const i = state.get("shown").indexOf(name);
      put(choose, { "aria-pressed": i >= 0 });
      choose.className = `opd-button opd-lp-key ${i < 0 ? "" : `opd-l-${hues[i]}`}`;
    }
  };
  return { node: holder, show };
};

/** @param {number} value */
const plainNumber = (value) => number(value);
/** @param {number} value */
const clipWords = (value) => (value ? `± ${number(value)}` : "off");
/** @param {number} value */
const wholePercent = (value) => `${Math.round(100 * value)} %`;

/** @typedef {"parameter" | "clip" | "temperature" | "mass" | "steps"} Knob */
/** @type {[name: Knob, title: string, low: number, high: number, step: number, say: (value: number) => string][]} */
const KNOBS = [
  ["parameter", "β or α", 0.05, 0.95, 0.05, plainNumber],
  ["clip", "clip the push at", 0, 6, 0.25, clipWords],
  ["temperature", "teacher's temperature", 0.3, 3, 0.1, plainNumber],
  ["mass", "teacher gives the token", 0.05, 0.95, 0.05, wholePercent],
  ["steps", "steps taken", 0, 400, 10, String],
];

/** @param {State} state */
const knobRow = (state) => {
  const node = make("div", "opd-knobs");
  const knobs = KNOBS.map(([name, title, min, max, step, say]) => {
    const holder = make("label", "opd-knob", title);
    const input = put(make("input"), { type: "range", min, max, step });
    const told = make("output");
    input.addEventListener("input", () => state.set(name, Number(input.value)));
    holder.append(input, told);
    node.append(holder);
    return { name, input, told, say };
  });
  const show = () => {
    for (const { name, input, told, say } of knobs) {
      input.value = String(state.get(name));
      told.textContent = say(state.get(name));
    }
  };
  return { node, show };
};

// ── Curves over the log ratio, two hills and one Gaussian ────────────────────────────────────────

/**
 * Draw one curve per loss; what is higher than `tall` is left out.
 * @param {string} title
 * @param {number} tall
 * @param {{ name: string, look: string, values: number[] }[]} curves
 */
const drawCurves = (title, tall, curves) => {
  const lines = curves.map(({ name, look, values }) => {
    const y = values.map((value) => (Math.abs(value) > tall ? NaN : value));
    return { name, look, kind: "line", x: RATIOS, y };
  });
  return linePlot({ label: title, told: ENDS, x: [-6, 6], y: [-tall, tall], marks: [], lines })
    .node;
};

/** @param {number[]} logits */
const densityOf = (logits) => logSoftmax(logits).map(Math.exp);

/**
 * Draw the teacher's two hills and the Gaussian that a loss fits to them.
 * @param {[centre: number, width: number]} fit
 * @param {number} temperature
 * @param {number} alone share on one hill from which the other counts as left out
 */
const drawHills = ([centre, width], temperature, alone) => {
  const hills = densityOf(hillsOf(temperature));
  const student = densityOf(bell(centre, width));
  const start = densityOf(bell(...START));
  const left = student.reduce((total, share, k) => total + (SPACE[k] < 0.1 ? share : 0), 0);
  const top = Math.max(...hills, ...student, ...start) * 1.05;
  /** @param {string} look @param {string} kind @param {number[]} y */
  const line = (look, kind, y) => ({ name: look, look, kind, x: SPACE, y });
  const isCovering = Math.min(left, 1 - left) > alone;
  const plot = linePlot({
    label: isCovering ? "covers both hills" : `sits on the ${left > 0.5 ? "left" : "right"} hill`,
    told: `centre ${number(centre)}, width ${number(width)}`,
    x: [-6, 6],
    y: [0, top],
    marks: [],
    lines: [
      line("student", "faint", start),
      line("teacher", "line", hills),
      line("student", "line", student),
    ],
  });
  plot.node.classList.add("opd-hills");
  return plot.node;
};

const SIGNS = [
  ["teacher", "teacher: a dot to drag, two hills; a ring where its temperature puts it"],
  ["student", "student: a dot to drag, its way in the steps taken; a Gaussian, thin before them"],
];

const signRow = () => {
  const node = make("div", "opd-signs");
  node.append(...SIGNS.map(([look, words]) => make("span", `opd-lp-key opd-l-${look}`, words)));
  return node;
};

/**
 * Make the two worlds of one loss.
 * @param {string} name
 * @param {string} hue
 * @param {PlaygroundPayload} data
 * @param {State} state
 * @param {Losses} losses
 */
const worldOf = (name, hue, data, state, losses) => {
  const node = make("div", "opd-world");
  const head = make("h4");
  const triangle = trianglePlot(losses.labelOf(name), state);
  const hills = make("div");
  const note = make("div", "opd-stale");
  head.append(make("span", `opd-lp-key opd-l-${hue}`, losses.labelOf(name)));
  node.append(head, triangle.node, hills, note);
  const staleWords = () => {
    if (!losses.isOwn(name) || !losses.isStale()) return "";
    return state.live
      ? "Python computes …"
      : "at the settings of the saved page; move it with .live()";
  };
  /** @param {LossResult} result */
  const update = (result) => {
    triangle.update(result);
    hills.replaceChildren(drawHills(result.fit, state.get("temperature"), data.alone));
    note.textContent = staleWords();
  };
  return { name, node, update };
};

// ── Own losses: what the audit says ──────────────────────────────────────────────────────────────

/** @param {LossCard} card */
const drawCard = ({ name, verdict, flags, check, held, rows }) => {
  const node = make("div", "opd-card");
  const list = make("ul");
  for (const [flag, said] of [...flags, ...(held ? [["finite differences", check]] : [])]) {
    const line = make("li");
    line.append(make("b", "", flag), `: ${said}`);
    list.append(line);
  }
  const table = make("table");
  const head = make("tr");
  for (const title of ["divergence", "to", "cosine", "length"]) {
    head.append(put(make("th", "", title), { scope: "col" }));
  }
  table.append(head);
  for (const [divergence, target, cosine, ratio] of rows) {
    const row = make("tr");
    const cells = [divergence, target, number(cosine, true), `× ${number(ratio)}`];
    row.append(...cells.map((words) => make("td", "", words)));
    table.append(row);
  }
  node.append(make("h4", "", `audit of ${name}`), make("b", "", verdict));
  if (list.children.length) node.append(list);
  if (!held) node.append(make("div", "opd-soft", check));
  node.append(table);
  return node;
};

// ── A token of a trace ───────────────────────────────────────────────────────────────────────────

// A bar to the right for a push up, to the left for a push down.
/** @param {number} value */
const swing = (value) => {
  const track = put(make("span", "opd-swing"), { title: number(value, true) });
  const bar = put(make("i"), { [value > 0 ? "data-up" : "data-down"]: "" });
  bar.style.width = `${50 * Math.sqrt(Math.min(1, Math.abs(value)))}%`;
  track.append(bar);
  return track;
};

/** @param {number} count losses @param {string} look @param {Node[]} cells */
const tokenRow = (count, look, cells) => {
  const node = make("div", `opd-token-row ${look}`);
  node.style.setProperty("--n", String(Math.max(1, count)));
  node.append(...cells);
  return node;
};

/**
 * Make the panel of one token: how each built-in loss pushes the logit of every candidate.
 * @param {Text} text
 * @param {Duel} duel
 * @param {string} rival
 * @param {State} state
 * @param {Losses} losses
 */
const tokenPanel = (text, duel, rival, state, losses) => {
  const node = make("div", "opd-panel");
  const index = duelIndex(duel);
  const most = Math.max(...duel.count) + 1;
  const logOf = (/** @type {number} */ share) => Math.log(Math.max(share, LEAST_SHARE));
  /** @param {number} row */
  const show = (row) => {
    if (row < 0 || row >= text.index.length) return;
    const candidates = candidatesAt(duel, index, rival, row);
    const built = state.get("shown").filter((name) => !losses.isOwn(name));
    const student = candidates.map(([, share]) => logOf(share));
    const teacher = logSoftmax(candidates.map(([, , share]) => logOf(share)));
    const pushes = built.map((name) => losses.push(name).gradient(student, teacher));
    const rows = candidates.map(([word, own, other], k) =>
      tokenRow(built.length, "", [
        make("span", "opd-word", word),
        make("span", "opd-p", percent(own)),
        make("span", "opd-p", percent(other)),
        ...pushes.map((push) => swing(push[k])),
      ]),
    );
    const titles = [`position ${row}`, "student", rival, ...built.map(losses.labelOf)];
    const headCells = titles.map((title) => make("span", "", title));
    const head = tokenRow(built.length, "opd-token-head", headCells);
    if (!rows.length) rows.push(tokenRow(built.length, "", [make("span", "opd-soft", "no room")]));
    // As high as ever, or the page would jump under the pointer.
    while (rows.length < most) rows.push(tokenRow(built.length, "", []));
    const told = "Push on each token's logit: bars on a √ scale, full at 1; blue up, orange down.";
    node.replaceChildren(head, ...rows, make("div", "opd-soft", told));
  };
  return { node, show };
};

/**
 * Make the strip and the panel of a trace, if the payload has one.
 * @param {PlaygroundPayload} data
 * @param {State} state
 * @param {Losses} losses
 */
const tracePart = ({ text, duel, policies }, state, losses) => {
  const rival = policies?.find((name) => name !== "student");
  if (!text || !duel) return { nodes: [], show: () => {} };
  const strip = tokenStrip({ text, state, label: "Tokens to push" });
  strip.paint({
    key: "none",
    label: "",
    unit: "",
    kind: "amount",
    limit: 1,
    less: "",
    more: "",
    names: [],
    values: new Float32Array(text.index.length),
    peaks: [],
  });
  if (!rival) return { nodes: [strip.node, make("div", "opd-panel")], show: () => {} };
  const panel = tokenPanel(text, duel, rival, state, losses);
  return { nodes: [strip.node, panel.node], show: panel.show };
};

// ── The view ─────────────────────────────────────────────────────────────────────────────────────

/**
 * Make the curves and the worlds of the losses shown.
 * @param {PlaygroundPayload} data
 * @param {State} state
 * @param {Losses} losses
 */
const lossPictures = (data, state, losses) => {
  const curves = make("div", "opd-curves");
  const worlds = make("div", "opd-worlds");
  /** @type {ReturnType<typeof worldOf>[]} */
  let columns = [];
  const draw = () => {
    const results = state.get("shown").map((name, i) => {
      return { name, look: data.hues[i], result: losses.resultOf(name) };
    });
    const pulls = results.flatMap(({ result }) => result.pulls).filter(Number.isFinite);
    const tall = Math.min(1, Math.max(0.25, ...pulls.map(Math.abs)));
    /** @param {"weights" | "pulls"} key */
    const curvesOf = (key) =>
      results.map(({ name, look, result }) => ({ name, look, values: result[key] }));
    curves.replaceChildren(
      drawCurves("push per unit of probability", data.tall, curvesOf("weights")),
      drawCurves("push on the token's logit", tall, curvesOf("pulls")),
    );
    results.forEach(({ name, result }, i) => {
      if (columns[i]?.name === name) columns[i].update(result);
    });
  };
  const rebuild = () => {
    const shown = state.get("shown");
    columns = shown.map((name, i) => worldOf(name, data.hues[i], data, state, losses));
    worlds.replaceChildren(...columns.map(({ node }) => node));
  };
  return { curves, worlds, draw, rebuild };
};

define("playground", ({ box, data, state }) => {
  const losses = lossesOf(data, state);
  const buttons = lossButtons(data, state, losses);
  const knobs = knobRow(state);
  const pictures = lossPictures(data, state, losses);
  const trace = tracePart(data, state, losses);
  const { curves, worlds } = pictures;
  const cards = data.cards.map(drawCard);
  box.append(...titleOf(data), buttons.node, knobs.node, curves, signRow(), worlds, ...cards);
  box.append(...trace.nodes);

  const draw = () => {
    pictures.draw();
    trace.show(state.get("selected"));
  };
  const rebuild = () => {
    buttons.show();
    pictures.rebuild();
    draw();
  };
  const compute = async () => {
    await losses.askPython();
    draw();
  };
  let timer = 0;
  let frame = 0;
  const changeSettings = () => {
    knobs.show();
    frame ||= requestAnimationFrame(() => {
      frame = 0;
      draw();
    });
    if (!state.live || !losses.hasOwn || !losses.isStale()) return;
    clearTimeout(timer);
    timer = setTimeout(compute, PATIENCE);
  };

  for (const [name] of KNOBS) state.on(name, changeSettings);
  state.on("teacher", changeSettings);
  state.on("student", changeSettings);
  state.on("shown", rebuild);
  state.on("selected", trace.show);
  state.on("hovered", (row) => trace.show(row < 0 ? state.get("selected") : row));
  knobs.show();
  rebuild();
  return () => {
    clearTimeout(timer);
    cancelAnimationFrame(frame);
  };
});
