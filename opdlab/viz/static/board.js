// RunBoard: small plots on one axis of steps; a slider (or the pointer) reads all at one step.

/** @import { BoardPayload, Line, Plot, State } from "./types.js" */
/** @import { DrawnPlot } from "./lines.js" */

import { clamp, closest, define, make, makeButton, number, put, titleOf } from "./core.js";
import { linePlot, valueAt } from "./lines.js";

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

  const bar = make("div", "opd-board-bar");
  bar.append(...buttons, slider, at);
  box.append(...titleOf(data), make("div", "opd-said", data.said));
  if (data.plots.length) box.append(bar, grid.node);
  if (data.alarms.length) box.append(alarmList(data));
  slider.value = String(last);
  state.on("hidden", draw);
  draw();
});
