// MethodMap: a heat map over two knobs. Menus choose what is compared and turn the other knobs; a cell shows all arms.

/** @import { MapPayload, NamedOne, State, Traits } from "./types.js" */

import { define, make, makeButton, number, put, titleOf } from "./core.js";

/** @param {number} value */
const signed = (value) => (Number.isNaN(value) ? "–" : number(Math.round(100 * value) / 100, true));

// ── Model ────────────────────────────────────────────────────────────────────────────────────────

/** @param {NamedOne[]} named @param {string} name */
const placeOf = (named, name) =>
  Math.max(
    0,
    named.findIndex((one) => one.name === name),
  );

/**
 * The numbers of the present choice.
 * @param {MapPayload} data
 * @param {State} state
 */
const atChoice = (data, state) => {
  const [columns, rows, ...others] = data.settings;
  const size = columns.length * rows.length;
  const settings = others.reduce((product, found) => product * found.length, 1);
  /** The place of the present metric, budget and settings among all choices. */
  const choice = () => {
    const metric = placeOf(data.metrics, state.get("metric"));
    const budget = placeOf(data.budgets, state.get("budget"));
    const at = state.get("at");
    const setting = others.reduce((place, found, i) => place * found.length + (at[i] ?? 0), 0);
    return (metric * data.budgets.length + budget) * settings + setting;
  };
  const choices = data.metrics.length * data.budgets.length * settings;
  const pair = () =>
    data.pairs.findIndex(
      ([arm, other]) => arm === state.get("arm") && other === state.get("against"),
    );
  /** @param {"mean" | "low" | "high" | "side"} name @param {number} cell */
  const difference = (name, cell) =>
    pair() < 0 ? NaN : data[name][(pair() * choices + choice()) * size + cell];
  /** @param {"own" | "half"} name @param {number} arm @param {number} cell */
  const score = (name, arm, cell) => data[name][(arm * choices + choice()) * size + cell];
  const limit = () => data.limits[placeOf(data.metrics, state.get("metric"))];
  return { columns, rows, size, difference, score, limit };
};

/** @typedef {ReturnType<typeof atChoice>} Now */

/**
 * Whether the difference of a cell is on another side than that of its neighbour.
 * @param {Now} now
 * @param {number} cell
 * @param {number} step to the neighbour
 */
const isBorder = (now, cell, step) => {
  const isLast =
    step === 1 ? cell % now.columns.length === now.columns.length - 1 : cell + step >= now.size;
  return !isLast && now.difference("side", cell) !== now.difference("side", cell + step);
};

/** @param {number} value @param {number} limit */
const inkOf = (value, limit) => {
  if (Number.isNaN(value)) return "";
  const [colour, strongest] = value > 0 ? ["138, 111, 192", 0.62] : ["128, 128, 128", 0.45];
  return `rgba(${colour}, ${strongest * Math.min(1, Math.sqrt(Math.abs(value) / limit))})`;
};

/** @param {MapPayload} data @param {State} state @param {Now} now */
const sentence = (data, state, now) => {
  /** @param {NamedOne[]} named @param {string} name */
  const label = (named, name) => named[placeOf(named, name)].label;
  let wins = 0;
  let losses = 0;
  for (let i = 0; i < now.size; i += 1) {
    wins += Number(now.difference("side", i) > 0);
    losses += Number(now.difference("side", i) < 0);
  }
  const pair = `${label(data.arms, state.get("arm"))} less ${label(data.arms, state.get("against"))}`;
  const equal = label(data.budgets, state.get("budget"));
  const counts = `Clearly better in ${wins} of ${now.size} cells, clearly worse in ${losses}`;
  return `${label(data.metrics, state.get("metric"))}: ${pair}, at ${equal}. ${counts}.`;
};

// ── Parts ────────────────────────────────────────────────────────────────────────────────────────

/**
 * @param {string} words
 * @param {string[]} options
 * @param {(place: number) => void} hear
 */
const menu = (words, options, hear) => {
  const node = make("label");
  const select = make("select");
  for (const option of options) select.append(make("option", "", option));
  select.addEventListener("change", () => hear(select.selectedIndex));
  node.append(words, select);
  /** @param {number} place */
  const show = (place) => {
    select.selectedIndex = place;
  };
  return { node, show };
};

/** @param {MapPayload} data @param {State} state */
const menus = (data, state) => {
  const node = make("div", "opd-mm-knobs");
  /** @type {(() => void)[]} */
  const shows = [];
  /** @param {string} words @param {"arm" | "against" | "metric" | "budget"} trait @param {NamedOne[]} named */
  const choose = (words, trait, named) => {
    if (named.length < 2) return;
    const labels = named.map((one) => one.label);
    const one = menu(words, labels, (place) => state.set(trait, named[place].name));
    shows.push(() => one.show(placeOf(named, state.get(trait))));
    node.append(one.node);
  };
  const bases = data.arms.filter((arm) => data.pairs.some(([, other]) => other === arm.name));
  choose("method", "arm", data.arms);
  choose("against", "against", bases);
  choose("score", "metric", data.metrics);
  choose("held equal", "budget", data.budgets);
  data.knobs.slice(2).forEach((knob, i) => {
    const one = menu(knob.label, data.settings[i + 2], (place) => {
      const at = [...state.get("at")];
      at[i] = place;
      state.set("at", at);
    });
    shows.push(() => one.show(state.get("at")[i] ?? 0));
    node.append(one.node);
  });
  return { node, show: () => shows.forEach((show) => show()) };
};

/** @param {MapPayload} data @param {State} state @param {Now} now */
const heatMap = (data, state, now) => {
  const node = make("table", "opd-mm");
  const [first, second] = data.knobs;
  node.append(make("caption", "", `${first.label} →   ${second.label} ↓`));
  const top = node.createTHead().insertRow();
  top.insertCell();
  for (const words of now.columns) top.append(put(make("th", "", words), { scope: "col" }));
  const body = node.createTBody();
  const cells = now.rows.flatMap((words, y) => {
    const row = body.insertRow();
    row.append(put(make("th", "", words), { scope: "row" }));
    return now.columns.map((_, x) => {
      const button = makeButton("opd-mm-button");
      button.className = "opd-mm-button";
      put(button, { "data-cell": y * now.columns.length + x });
      row.insertCell().append(button);
      return button;
    });
  });
  const paint = () =>
    cells.forEach((button, i) => {
      const [mean, low, high] = ["mean", "low", "high"].map((name) =>
        now.difference(/** @type {"mean"} */ (name), i),
      );
      const holder = /** @type {HTMLElement} */ (button.parentElement);
      const looks = {
        "opd-mm-clear": now.difference("side", i) !== 0,
        "opd-mm-right": isBorder(now, i, 1),
        "opd-mm-below": isBorder(now, i, now.columns.length),
      };
      const on = Object.entries(looks).flatMap(([look, isOn]) => (isOn ? [look] : []));
      holder.className = ["opd-mm-cell", ...on].join(" ");
      holder.style.background = inkOf(mean, now.limit());
      button.textContent = signed(mean);
      const place = `${first.label} ${now.columns[i % now.columns.length]}, ${second.label} ${now.rows[Math.floor(i / now.columns.length)]}`;
      const words = `${place}: ${signed(mean)}, 95 % from ${signed(low)} to ${signed(high)}`;
      put(button, { "aria-label": words, "aria-pressed": i === state.get("selected") });
    });
  return { node, cells, paint };
};

/** @param {MapPayload} data @param {State} state @param {Now} now */
const detailOf = (data, state, now) => {
  const node = put(make("div", "opd-mm-detail"), { role: "status" });
  const show = () => {
    const cell = state.get("selected");
    if (cell < 0 || cell >= now.size) return;
    const [x, y] = [cell % now.columns.length, Math.floor(cell / now.columns.length)];
    const place = `${data.knobs[0].label} ${now.columns[x]}, ${data.knobs[1].label} ${now.rows[y]}`;
    const metric = data.metrics[placeOf(data.metrics, state.get("metric"))];
    const bars = make("div", "opd-mm-bars");
    const scores = data.arms.map((_, i) => now.score("own", i, cell));
    const known = scores.filter((score) => !Number.isNaN(score));
    const [low, high] = [Math.min(0, ...known), Math.max(1e-6, ...known)];
    data.arms.forEach((arm, i) => {
      const bar = make("div", "opd-mm-bar");
      const fill = make("div", "opd-mm-fill");
      fill.style.width = `${(100 * Math.max(0, scores[i] - low)) / (high - low) || 0}%`;
      bar.append(fill);
      const half = now.score("half", i, cell);
      const range = Number.isNaN(half) ? "" : ` ± ${number(Math.round(100 * half) / 100)}`;
      const label = put(make("span", "", arm.label), { title: arm.description });
      bars.append(label, bar, make("span", "", `${number(scores[i])}${range}`));
    });
    const words = `${metric.label}, ${data.seeds} seeds. ${metric.description}`;
    node.replaceChildren(make("b", "", place), make("span", "opd-soft", `  ${words}`), bars);
  };
  return { node, show };
};

define("map", ({ box, data, state }) => {
  const now = atChoice(data, state);
  const chosen = menus(data, state);
  const map = heatMap(data, state, now);
  const detail = detailOf(data, state, now);
  const said = put(make("div", "opd-mm-said"), { role: "status" });
  const holder = make("div", "opd-mm-box");
  const legend =
    "Violet: the first is better; grey: it is worse. Bold, inside the lines: the 95 % interval over seeds lies beyond ±0.01.";

  const redraw = () => {
    chosen.show();
    said.textContent = sentence(data, state, now);
    map.paint();
    detail.show();
  };
  map.node.addEventListener("click", ({ target }) => {
    const button = target instanceof Element ? target.closest("[data-cell]") : null;
    if (button) state.set("selected", Number(button.getAttribute("data-cell")));
  });
  map.node.addEventListener("keydown", (event) => {
    const steps = {
      ArrowLeft: -1,
      ArrowRight: 1,
      ArrowUp: -now.columns.length,
      ArrowDown: now.columns.length,
    };
    const step = steps[/** @type {keyof typeof steps} */ (event.key)];
    const to = state.get("selected") + step;
    if (!step || to < 0 || to >= now.size) return;
    event.preventDefault();
    state.set("selected", to);
    map.cells[to].focus();
  });
  holder.append(map.node);
  const premise = make("div", "opd-soft", data.premise);
  box.append(
    ...titleOf(data),
    premise,
    chosen.node,
    said,
    holder,
    make("div", "opd-peaks", legend),
    detail.node,
  );
  /** @type {(keyof Traits)[]} */
  const traits = ["arm", "against", "metric", "budget", "at", "selected"];
  for (const trait of traits) state.on(trait, redraw);
  redraw();
});
