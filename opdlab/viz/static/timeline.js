// Timeline: sums along the tokens, a line for each rollout, the fork of each, and under them the
// tokens of the one looked at. Of many rollouts each has a plot of its own for the log ratio.

/** @import { Channel, Completion, Plot, State, TimelinePayload } from "./types.js" */
/** @import { DrawnPlot } from "./lines.js" */
/** @import { Strip } from "./strip.js" */

import {
  clamp,
  define,
  drawLegend,
  kindsAt,
  liveRegion,
  make,
  makeBar,
  makeButton,
  moveCursor,
  number,
  promptBox,
  put,
  titleOf,
  wordAt,
} from "./core.js";
import { linePlot, partOf } from "./lines.js";
import { peaksIn, TALL_STRIP, tokenStrip } from "./strip.js";

/**
 * A plot with the rollouts that it shows.
 * @typedef {{ plot: Plot, shown: number[], drawn: DrawnPlot }} ShownPlot
 */

// ── Model ────────────────────────────────────────────────────────────────────────────────────────

/**
 * Return the first row of a rollout whose log ratio so far falls to the threshold; -1 for none.
 * @param {Completion} rollout
 * @param {ArrayLike<number>} cumulative
 * @param {number} threshold
 */
export const forkOf = ({ first, size }, cumulative, threshold) => {
  for (let row = first; row < first + size; row++) if (cumulative[row] <= -threshold) return row;
  return -1;
};

/** @param {Completion} rollout @param {number} position */
const rowIn = ({ first, size }, position) => first + clamp(position, 0, size - 1);

/** @param {TimelinePayload} data @param {State} state */
const modelOf = ({ text, paths }, state) => {
  const { texts } = text;
  return {
    /** @param {number} row */
    rolloutOf: (row) => texts.findIndex(({ first, size }) => row >= first && row < first + size),
    /** @param {number} k */
    nameOf: (k) => `rollout ${texts[k].sample}`,
    /** @param {number} k */
    forkOf: (k) => forkOf(texts[k], paths.cumulative_log_ratio, state.get("threshold")),
    /** @param {number} row @param {number} k */
    positionOf: (row, k) => row - texts[k].first,
  };
};

/** @typedef {ReturnType<typeof modelOf>} Model */

/**
 * Return the row that a key leads to; undefined for other keys. Up and down go to the same position
 * of another rollout.
 * @param {string} key
 * @param {Completion[]} texts
 * @param {number} k the present rollout
 * @param {number} position in it
 */
export const rowByKey = (key, texts, k, position) => {
  const here = texts[k];
  const other = (/** @type {number} */ step) =>
    rowIn(texts[(k + step + texts.length) % texts.length], position);
  /** @type {Record<string, number>} */
  const rows = {
    ArrowRight: rowIn(here, position + 1),
    ArrowLeft: rowIn(here, position - 1),
    Home: here.first,
    End: rowIn(here, here.size),
    ArrowDown: other(1),
    ArrowUp: other(-1),
  };
  return rows[key];
};

/** @param {TimelinePayload} data @returns {Channel} */
const channelOf = ({ against, limit, paths }) => ({
  key: "log_ratio",
  label: "log ratio",
  unit: "nats",
  kind: "ratio",
  less: "student over-confident",
  more: `${against} prefers`,
  limit,
  values: paths.log_ratio,
  peaks: [],
  names: [],
});

// ── Marks over the plots ─────────────────────────────────────────────────────────────────────────

/**
 * Make a plot's own marks: the line of the threshold, the fork of each rollout, the token looked at
 * and the band of the brush.
 * @param {ShownPlot} shownPlot
 * @param {TimelinePayload} data
 * @param {State} state
 * @param {Model} model
 */
const plotMarks = ({ plot, shown, drawn }, { paths }, state, model) => {
  const layer = make("div", "opd-timeline-layer");
  const band = make("div", "opd-timeline-band");
  const line = make("div", "opd-timeline-threshold");
  const dot = make("div", "opd-timeline-dot");
  const forks = shown.map((k) => ({ k, node: make("div", "opd-timeline-fork") }));
  layer.append(band, line, ...forks.map(({ node }) => node), dot);
  drawn.canvas.append(layer);
  /** @param {HTMLElement} node @param {number} row @param {number} k */
  const place = (node, row, k) => {
    node.style.left = `${partOf(model.positionOf(row, k), plot.x)}%`;
    node.style.top = `${100 - partOf(paths[plot.key ?? ""][row], plot.y)}%`;
  };
  const showForks = () => {
    line.hidden = plot.key !== "cumulative_log_ratio";
    line.style.top = `${100 - partOf(-state.get("threshold"), plot.y)}%`;
    for (const { k, node } of forks) {
      const row = model.forkOf(k);
      node.hidden = row < 0;
      if (row >= 0) place(node, row, k);
    }
  };
  /** @param {number} row @param {number} k */
  const showToken = (row, k) => {
    const isHere = shown.includes(k);
    dot.hidden = !isHere;
    if (isHere) place(dot, row, k);
    drawn.mark(isHere ? model.positionOf(row, k) : NaN);
  };
  /** @param {number[]} brush */
  const showBrush = ([from, to = from]) => {
    const k = from === undefined ? -1 : model.rolloutOf(from);
    band.hidden = !shown.includes(k);
    if (band.hidden) return;
    const ends = [from, to].map((row) => partOf(model.positionOf(row, k), plot.x));
    band.style.left = `${Math.min(...ends)}%`;
    band.style.width = `${Math.max(...ends) - Math.min(...ends)}%`;
  };
  return { showForks, showToken, showBrush };
};

// ── Parts ────────────────────────────────────────────────────────────────────────────────────────

/**
 * Make the list of rollouts: look of the line, reward, length, fork.
 * @param {TimelinePayload} data
 * @param {State} state
 * @param {Model} model
 */
const rolloutList = ({ text, looks, rewards }, state, model) => {
  const node = put(make("div", "opd-timeline-list"), { role: "group", "aria-label": "Rollouts" });
  const entries = text.texts.map(({ first, size }, k) => {
    const choose = makeButton("");
    const fork = make("span", "opd-soft");
    choose.append(make("span", `opd-lp-key opd-l-${looks[k]}`, model.nameOf(k)));
    if (rewards) choose.append(make("span", "", `reward ${number(rewards[k])}`));
    choose.append(make("span", "opd-soft", `${size} tokens`), fork);
    choose.addEventListener("click", () => state.set("selected", Math.max(first, model.forkOf(k))));
    node.append(choose);
    return { choose, fork };
  });
  const showForks = () =>
    entries.forEach(({ fork }, k) => {
      const row = model.forkOf(k);
      const place = `fork at ${model.positionOf(row, k)} ${row < 0 ? "" : wordAt(text, row)}`;
      fork.textContent = row < 0 ? "no fork" : place;
    });
  /** @param {number} chosen */
  const press = (chosen) =>
    entries.forEach(({ choose }, k) => put(choose, { "aria-pressed": k === chosen }));
  return { node, buttons: entries.map(({ choose }) => choose), showForks, press };
};

/** @param {State} state */
const thresholdField = (state) => {
  const node = make("label", "opd-soft");
  const field = put(make("input", "opd-field"), {
    type: "number",
    min: "0",
    step: "0.5",
    "aria-label": "Threshold of a fork, in nats",
  });
  field.addEventListener("change", () => {
    if (field.value !== "" && Number(field.value) >= 0) state.set("threshold", Number(field.value));
  });
  node.append("fork beyond ", field, " nats");
  const show = () => {
    field.value = String(state.get("threshold"));
  };
  return { node, show };
};

/**
 * Make the place of the strips; each is made when its rollout is first looked at.
 * @param {TimelinePayload} data
 * @param {State} state
 * @param {Model} model
 */
const stripHolder = (data, state, model) => {
  const { text } = data;
  const channel = channelOf(data);
  const node = make("div", "opd-timeline-text");
  /** @type {Map<number, Strip>} */
  const strips = new Map();
  /** @param {number} k */
  const makeStrip = (k) => {
    const { first, size, finish } = text.texts[k];
    const label = `Tokens of ${model.nameOf(k)}`;
    const strip = tokenStrip({ text, first, size, finish, state, label });
    strip.node.classList.toggle("opd-tall", size > TALL_STRIP);
    strip.paint({ ...channel, peaks: peaksIn(channel, first, size) });
    return strip;
  };
  /** @param {number} k */
  const open = (k) => {
    const strip = strips.get(k) ?? makeStrip(k);
    strips.set(k, strip);
    if (node.firstChild !== strip.node) node.replaceChildren(strip.node);
  };
  return { node, open };
};

/**
 * Make the list of the turns of the rollout looked at, each with its sums. A turn's button leads to
 * its first token.
 * @param {TimelinePayload} data
 * @param {State} state
 */
const turnList = ({ text, turns }, state) => {
  const node = put(make("div", "opd-timeline-turns"), { role: "group", "aria-label": "Turns" });
  node.hidden = !turns.length;
  /** @type {{ choose: HTMLElement, first: number, size: number }[]} */
  let shown = [];
  /** @param {number} k */
  const open = (k) => {
    const { first, size } = text.texts[k];
    const own = turns.filter((turn) => turn.first >= first && turn.first < first + size);
    shown = own.map((turn) => {
      const choose = makeButton("");
      choose.append(make("b", "", `turn ${turn.turn + 1}`));
      choose.append(make("span", "opd-soft", `${turn.tokens} tokens`));
      if (turn.log_ratio !== undefined) {
        choose.append(make("span", "", `log ratio ${number(turn.log_ratio, true)}`));
      }
      if (turn.kl !== undefined) choose.append(make("span", "", `KL ${number(turn.kl)}`));
      choose.addEventListener("click", () => state.set("selected", turn.first));
      return { choose, first: turn.first, size: turn.size };
    });
    node.replaceChildren(...shown.map(({ choose }) => choose));
  };
  /** @param {number} row */
  const press = (row) => {
    for (const { choose, first, size } of shown) {
      put(choose, { "aria-pressed": row >= first && row < first + size });
    }
  };
  return { node, open, press };
};

// The numbers of the token looked at.
/** @param {TimelinePayload} data @param {Model} model @param {number} row @param {number} k */
const factsOf = ({ text, paths, kinds }, model, row, k) => {
  const facts = [
    `log ratio ${number(paths.log_ratio[row], true)}`,
    `log ratio so far ${number(paths.cumulative_log_ratio[row], true)}`,
  ];
  if (paths.kl) facts.push(`KL so far ${number(paths.cumulative_kl[row])}`);
  return [
    make("b", "", model.nameOf(k)),
    make("span", "opd-word", wordAt(text, row)),
    make("span", "opd-soft", `position ${model.positionOf(row, k)}`),
    ...facts.map((fact) => make("span", "", fact)),
    ...kindsAt(kinds, row),
  ];
};

// ── Input ────────────────────────────────────────────────────────────────────────────────────────

/**
 * Return the function that gives the row whose line lies nearest to the pointer; with `kept` only
 * of that rollout.
 * @param {ShownPlot} shownPlot
 * @param {TimelinePayload} data
 */
const rowUnderPointer = ({ plot, shown, drawn }, { text, paths }) => {
  const { texts } = text;
  const last = plot.x[1];
  /** @param {PointerEvent} event @param {number} [kept] */
  return (event, kept = -1) => {
    const area = drawn.canvas.getBoundingClientRect();
    const at = Math.round(clamp((event.clientX - area.left) / area.width, 0, 1) * last);
    const height = 100 * (1 - clamp((event.clientY - area.top) / area.height, 0, 1));
    const isCandidate = (/** @type {number} */ k) => (kept < 0 ? at < texts[k].size : k === kept);
    const inside = shown.filter(isCandidate);
    const rows = (inside.length ? inside : shown).map((k) => rowIn(texts[k], at));
    const gapOf = (/** @type {number} */ row) =>
      Math.abs(partOf(paths[plot.key ?? ""][row], plot.y) - height);
    return rows.reduce((best, row) => (gapOf(row) < gapOf(best) ? row : best));
  };
};

/**
 * The pointer takes the line nearest to it; a drag brushes along that line, a click chooses.
 * @param {ShownPlot} shownPlot
 * @param {TimelinePayload} data
 * @param {State} state
 * @param {Model} model
 */
const listenToPointer = (shownPlot, data, state, model) => {
  const { canvas } = shownPlot.drawn;
  const rowUnder = rowUnderPointer(shownPlot, data);
  let start = -1; // of a drag
  let isDragged = false;
  canvas.addEventListener("pointermove", (event) => {
    const row = rowUnder(event, start < 0 ? -1 : model.rolloutOf(start));
    if (start >= 0 && row !== start) {
      isDragged = true;
      state.set("brush", [Math.min(start, row), Math.max(start, row)]);
    }
    state.set("hovered", row);
  });
  canvas.addEventListener("pointerleave", () => state.set("hovered", -1));
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    start = rowUnder(event);
    isDragged = false;
  });
  canvas.addEventListener("pointerup", () => {
    if (start >= 0 && !isDragged) {
      state.set("brush", []);
      state.set("selected", start);
    }
    start = -1;
  });
};

/**
 * Keys walk along a line and from line to line.
 * @param {ShownPlot} shownPlot
 * @param {TimelinePayload} data
 * @param {State} state
 * @param {Model} model
 * @param {(row: number, key: string | undefined) => void} focusPlot of the row's rollout
 */
const listenToKeys = ({ plot, drawn }, { text }, state, model, focusPlot) => {
  const { texts } = text;
  const { canvas } = drawn;
  put(canvas, {
    role: "slider",
    tabindex: "0",
    "aria-label": `Position, ${plot.label}`,
    "aria-valuemin": "0",
    "aria-valuemax": plot.x[1],
  });
  canvas.addEventListener("keydown", (event) => {
    const row = Math.max(0, state.get("selected"));
    const k = Math.max(0, model.rolloutOf(row));
    if (event.key === "Escape") state.set("brush", []);
    const to = rowByKey(event.key, texts, k, row - texts[k].first);
    if (to === undefined) return;
    event.preventDefault();
    state.set("selected", to);
    focusPlot(to, plot.key);
  });
};

// ── The view ─────────────────────────────────────────────────────────────────────────────────────

/** @param {TimelinePayload} data @returns {ShownPlot[]} */
const drawPlots = ({ own, plots, text }) => [
  ...own.map((plot, k) => ({ plot, shown: [k], drawn: linePlot(plot) })),
  ...plots.map((plot) => ({ plot, shown: [...text.texts.keys()], drawn: linePlot(plot) })),
];

/**
 * Arrange the plots: those of single rollouts, each with its rollout's button as caption, then the
 * others.
 * @param {TimelinePayload} data
 * @param {ShownPlot[]} plots
 * @param {HTMLElement[]} buttons
 */
const arrangePlots = (data, plots, buttons) => {
  const node = make("div", "opd-timeline");
  const count = data.own.length;
  if (count) {
    const head = make("div", "opd-timeline-head");
    const [label, told] = data.head;
    head.append(make("b", "", label), " ");
    head.append(make("span", "opd-soft", `${told}; orange: the threshold`));
    const own = make("div", "opd-timeline-own");
    plots.slice(0, count).forEach(({ drawn }, k) => {
      drawn.node.querySelector("figcaption")?.replaceChildren(buttons[k]);
      own.append(drawn.node);
    });
    node.append(head, own);
  }
  node.append(...plots.slice(count).map(({ drawn }) => drawn.node));
  return node;
};

/** @param {TimelinePayload} data @param {State} state */
const makeParts = (data, state) => {
  const model = modelOf(data, state);
  const plots = drawPlots(data);
  /** @param {number} row @param {string | undefined} key of the plot */
  const focusPlot = (row, key) => {
    const k = model.rolloutOf(row);
    const found = plots.find(({ plot, shown }) => plot.key === key && shown.includes(k));
    found?.drawn.canvas.focus();
  };
  for (const one of plots) {
    listenToPointer(one, data, state, model);
    listenToKeys(one, data, state, model, focusPlot);
  }
  const list = rolloutList(data, state, model);
  const legend = make("div");
  drawLegend(legend, channelOf(data));
  return {
    model,
    plots,
    list,
    turns: turnList(data, state),
    legend,
    marks: plots.map((one) => plotMarks(one, data, state, model)),
    strips: stripHolder(data, state, model),
    field: thresholdField(state),
    told: make("div", "opd-timeline-told"),
    spoken: liveRegion(),
  };
};

/** @param {ReturnType<typeof makeParts>} parts @param {TimelinePayload} data */
const drawers = (parts, data) => {
  const { model, plots, marks, list, turns, strips, legend, field, told, spoken } = parts;
  const { text, paths } = data;
  const channel = channelOf(data);
  const showForks = () => {
    field.show();
    for (const mark of marks) mark.showForks();
    list.showForks();
  };
  /** @param {number} row */
  const showToken = (row) => {
    const k = model.rolloutOf(row);
    if (k < 0) return;
    for (const mark of marks) mark.showToken(row, k);
    told.replaceChildren(...factsOf(data, model, row, k));
    moveCursor(legend, channel, paths.log_ratio[row]);
  };
  /** @param {number} k */
  const openRollout = (k) => {
    strips.open(k);
    list.press(k);
    turns.open(k);
    for (const { drawn, shown } of plots) {
      drawn.canvas.querySelectorAll(".opd-l").forEach((line, j) => {
        line.classList.toggle("opd-timeline-on", shown[j] === k);
      });
      // Tab goes to one of many plots, up and down to the others.
      drawn.canvas.tabIndex = shown.includes(k) ? 0 : -1;
    }
  };
  /** @param {number} row */
  const choose = (row) => {
    const k = model.rolloutOf(row);
    if (k < 0) return;
    openRollout(k);
    turns.press(row);
    showToken(row);
    const position = model.positionOf(row, k);
    const sum = number(paths.cumulative_log_ratio[row], true);
    const place = `${model.nameOf(k)}, position ${position}, ${wordAt(text, row)}`;
    const words = `${place}, log ratio so far ${sum}`;
    for (const { drawn } of plots) {
      put(drawn.canvas, { "aria-valuenow": position, "aria-valuetext": words });
    }
    spoken.textContent = words;
  };
  /** @param {number[]} brush */
  const showBrush = (brush) => {
    for (const mark of marks) mark.showBrush(brush);
  };
  return { showForks, showToken, showBrush, choose };
};

define("timeline", ({ box, data, state }) => {
  const { texts } = data.text;
  const parts = makeParts(data, state);
  const { list, turns, legend, strips, field, told, spoken } = parts;
  const draw = drawers(parts, data);
  const pictures = arrangePlots(data, parts.plots, list.buttons);
  box.append(...titleOf(data), ...texts.slice(0, 1).map(({ prompt }) => promptBox(prompt)));
  box.append(makeBar(field.node, legend), ...(data.own.length ? [] : [list.node]), pictures);
  box.append(told, turns.node, strips.node, spoken);
  if (!texts.length) {
    strips.node.append(make("span", "opd-soft", "(no tokens)"));
    return;
  }
  if (state.get("selected") < 0) state.set("selected", texts[0].first);
  state.on("threshold", draw.showForks);
  state.on("brush", draw.showBrush);
  state.on("selected", draw.choose);
  state.on("hovered", (row) => draw.showToken(row < 0 ? state.get("selected") : row));
  draw.showForks();
  draw.showBrush(state.get("brush"));
  draw.choose(state.get("selected"));
});
