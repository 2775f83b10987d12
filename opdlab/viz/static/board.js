// RunBoard: small plots on one axis of steps; a slider (or the pointer) reads all at one step.

/** @import { BoardPayload, KeptRollout, Line, Plot, State } from "./types.js" */
/** @import { DrawnPlot } from "./lines.js" */

import {
  clamp,
  closest,
  define,
  make,
  makeButton,
  measure,
  number,
  put,
  titleOf,
  wordAt,
} from "./core.js";
import { linePlot, valueAt } from "./lines.js";
import { peaksIn, tokenStrip } from "./strip.js";

/**
 * Return the lines that are read at a step: not dots, and of a faint line beside its smoothed one
 * only the smoothed.
 * @param {Line[]} lines
 */
export const readableLines = (lines) =>
  lines.filter((line) => {
    const hasOther = lines.some((other) => other !== line && other.name === line.name);
    return line.kind !== "dots" && !(line.kind === "faint" && hasOther);
  });

/** @param {BoardPayload} data @param {State} state */
const runButtons = ({ runs, hues }, state) =>
  runs.map((name) => {
    const node = makeButton("");
    node.append(make("span", `opd-lp-key opd-l-${hues[name]}`, name));
    node.addEventListener("click", () => {
      const hidden = state.get("hidden");
      const isHidden = hidden.includes(name);
      state.set("hidden", isHidden ? hidden.filter((other) => other !== name) : [...hidden, name]);
    });
    return node;
  });

/** @param {BoardPayload} data */
const alarmList = ({ alarms, runs }) => {
  const node = make("ol", "opd-alarms");
  for (const [sign, run, step, signature, sentence, remedy] of alarms) {
    const line = make("li");
    const place = `${runs.length > 1 ? `${run}, ` : ""}step ${step}, ${signature}: `;
    line.append(make("b", "", sign), make("span", "opd-sign", place));
    line.append(`${sentence} `, make("span", "opd-soft", remedy));
    node.append(line);
  }
  return node;
};

/**
 * Make the plots. `draw` leaves hidden runs out, `read` shows the numbers at a step (NaN: none).
 * @param {BoardPayload} data
 */
const plotGrid = (data) => {
  const node = make("div", "opd-plots");
  /** @type {(DrawnPlot & { plot: Plot })[]} */
  let drawn = [];
  /** @param {Line} line @param {number} step */
  const figure = (line, step) =>
    `${data.runs.length > 1 ? `${line.name} ` : ""}${number(valueAt(line, step))}`;
  /** @param {Set<string>} hidden */
  const draw = (hidden) => {
    drawn = data.plots.map((plot) => {
      const lines = plot.lines.filter(({ name }) => !hidden.has(name));
      return { plot, ...linePlot({ ...plot, lines }) };
    });
    node.replaceChildren(...drawn.map((one) => one.node));
  };
  /** @param {number} step */
  const read = (step) => {
    for (const { plot, told, mark } of drawn) {
      mark(step);
      told.textContent = Number.isNaN(step)
        ? plot.told
        : readableLines(plot.lines)
            .map((line) => figure(line, step))
            .join(" · ");
    }
    return drawn.map(({ plot, told }) => `${plot.label} ${told.textContent}`);
  };
  return { node, draw, read };
};

/**
 * Draw where a step's time goes: a bar for each phase, as long as its share, with the limit in it.
 * @param {BoardPayload} data
 * @returns {Element[]} a heading and the bars; none where the time is not known
 */
const phaseBars = ({ phases = [] }) => {
  if (!phases.length) return [];
  const node = make("div", "opd-phases");
  for (const [words, share, reach] of phases) {
    const phase = make("div", "opd-phase");
    phase.style.flexGrow = String(share);
    const bar = make("div", "opd-phase-bar");
    const limit = make("div");
    limit.style.width = `${100 * reach}%`;
    bar.append(limit);
    phase.append(bar, words);
    node.append(phase);
  }
  return [make("div", "opd-soft", "where the time of a step goes"), node];
};

// ── The rollouts of a step ───────────────────────────────────────────────────────────────────────

/**
 * Return the kept step that is nearest to a step; undefined where none was kept.
 * @template {{ step: number }} Kept
 * @param {Kept[]} kept
 * @param {number} step
 */
export const nearestKept = (kept, step) =>
  [...kept].sort((a, b) => Math.abs(a.step - step) - Math.abs(b.step - step))[0];

/**
 * Return the rollouts of a step by prompt, in order.
 * @param {KeptRollout[]} rollouts
 */
export const byPrompt = (rollouts) => {
  /** @type {Map<string, KeptRollout[]>} */
  const groups = new Map();
  for (const one of rollouts) {
    const group = groups.get(one.prompt) ?? [];
    group.push(one);
    groups.set(one.prompt, group);
  }
  return [...groups];
};

/** @param {KeptRollout} rollout @param {(rollout: KeptRollout) => void} open */
const rolloutLine = (rollout, open) => {
  const { reward, tokens, kl, end, finish, first } = rollout;
  const node = makeButton("opd-kept-line");
  node.disabled = first < 0;
  if (first < 0) node.title = "This page has no room for its tokens.";
  const said = reward === null ? "" : number(reward);
  node.append(
    make("span", "opd-kept-reward", said),
    put(make("span", "opd-kept-end", end), { dir: "auto" }),
    make("span", "opd-kept-number", `${tokens} tokens${finish === "length" ? ", cut off" : ""}`),
    make("span", "opd-kept-number", kl === null ? "" : `KL ${number(kl)}`),
  );
  node.addEventListener("click", () => open(rollout));
  return node;
};

/** @param {BoardPayload} data @param {State} state */
const keptPanel = ({ text, channel, kept = [] }, state) => {
  const node = make("div", "opd-kept");
  const steps = put(make("div", "opd-buttons"), { role: "group", "aria-label": "Kept rollouts" });
  const list = make("div", "opd-kept-list");
  const strip = make("div", "opd-kept-strip");
  const told = put(make("div", "opd-soft opd-kept-told"), { role: "status" });
  node.append(steps, list, strip, told);
  steps.append(make("span", "opd-soft", "rollouts of step "));
  const buttons = kept.map(({ step }) => {
    const button = makeButton("", String(step));
    button.addEventListener("click", () => state.set("step", step));
    steps.append(button);
    return { step, button };
  });
  const showToken = () => {
    const row = state.get("selected");
    const isHere = text && channel && row >= 0 && row < text.index.length;
    told.textContent =
      isHere && strip.firstChild
        ? `${wordAt(text, row)}: ${channel.label} ${measure(channel.values[row], channel)}`
        : "";
  };
  /** @param {KeptRollout} rollout */
  const open = ({ first, size, finish }) => {
    if (!text) return;
    // The strip of the last rollout still hears the state, but is no part of the page.
    const drawn = tokenStrip({ text, first, size, finish, state });
    const peaks = channel ? peaksIn(channel, first, size) : [];
    strip.replaceChildren(drawn.node);
    if (channel) drawn.paint({ ...channel, peaks });
    state.set("selected", peaks[0] ?? first);
    showToken();
  };
  const show = () => {
    const now = kept.find(({ step }) => step === state.get("step"));
    for (const { step, button } of buttons) put(button, { "aria-pressed": step === now?.step });
    list.replaceChildren();
    strip.replaceChildren();
    for (const [prompt, rollouts] of byPrompt(now?.rollouts ?? [])) {
      list.append(put(make("div", "opd-kept-prompt", prompt), { dir: "auto" }));
      list.append(...rollouts.map((rollout) => rolloutLine(rollout, open)));
    }
    showToken();
  };
  state.on("step", show);
  state.on("selected", showToken);
  show();
  return node;
};

define("board", ({ box, data, state }) => {
  const [first, last] = data.plots.length ? data.plots[0].x : [0, 0];
  const buttons = data.runs.length > 1 ? runButtons(data, state) : [];
  const slider = put(make("input"), {
    type: "range",
    min: first,
    max: last,
    step: 1,
    "aria-label": "Step to read the curves at",
  });
  const at = make("span", "opd-at");
  const grid = plotGrid(data);
  let step = NaN;

  const read = () => {
    const words = grid.read(step);
    at.textContent = Number.isNaN(step) ? "" : `step ${step}`;
    put(slider, { "aria-valuetext": [at.textContent, ...words].join(", ") });
  };
  /** @param {number} to */
  const go = (to) => {
    step = to;
    if (!Number.isNaN(step)) slider.value = String(step);
    read();
  };
  const draw = () => {
    const hidden = new Set(state.get("hidden"));
    grid.draw(hidden);
    buttons.forEach((one, i) => put(one, { "aria-pressed": !hidden.has(data.runs[i]) }));
    read();
  };
  slider.addEventListener("input", () => go(Number(slider.value)));
  grid.node.addEventListener("pointermove", (event) => {
    const area = closest(event, ".opd-lp-area")?.getBoundingClientRect();
    if (!area?.width) return;
    const share = clamp((event.clientX - area.left) / area.width, 0, 1);
    go(Math.round(first + (last - first) * share));
  });
  grid.node.addEventListener("pointerleave", () => go(NaN));
  const { kept = [] } = data;
  const openAt = (/** @type {number} */ to) => {
    const nearest = nearestKept(kept, to);
    if (nearest) state.set("step", nearest.step);
  };
  grid.node.addEventListener("click", (event) => {
    if (closest(event, ".opd-lp-area") && !Number.isNaN(step)) openAt(step);
  });
  slider.addEventListener("keydown", ({ key }) => {
    if (key === "Enter") openAt(Number(slider.value));
  });

  const bar = make("div", "opd-board-bar");
  bar.append(...buttons, slider, at);
  box.append(...titleOf(data), make("div", "opd-said", data.said));
  if (data.plots.length) box.append(bar, grid.node);
  box.append(...phaseBars(data));
  if (kept.length) box.append(keptPanel(data, state));
  if (data.alarms.length) box.append(alarmList(data));
  slider.value = String(last);
  state.on("hidden", draw);
  draw();
});
