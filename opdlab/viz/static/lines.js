// Lines over steps as SVG that stretches with its box, so nothing is measured.

/** @import { Line, Plot } from "./types.js" */

import { clamp, make, number, shape } from "./core.js";

/**
 * Return the place of a value on an axis, in percent.
 * @param {number} value
 * @param {number[]} ends
 */
export const partOf = (value, [low, high]) => 100 * clamp((value - low) / (high - low || 1), 0, 1);

/** @param {Line} line @param {Plot} plot */
const pathOf = ({ x, y, kind }, plot) => {
  let path = "";
  let isDown = false; // the pen
  for (let i = 0; i < x.length; i++) {
    if (Number.isFinite(y[i])) {
      const point = `${partOf(x[i], plot.x).toFixed(2)} ${(100 - partOf(y[i], plot.y)).toFixed(2)}`;
      path += isDown && kind !== "dots" ? `L${point}` : `M${point}h0`;
    }
    isDown = Number.isFinite(y[i]);
  }
  return path;
};

// A number at an end of the scale; one that is nothing beside the other end is written as 0.
/** @param {number} value @param {number[]} ends */
const endOf = (value, [low, high]) => number(Math.abs(value) < (high - low) / 1000 ? 0 : value);

/** @param {Plot} plot */
const drawLines = (plot) => {
  const svg = shape("svg", {
    viewBox: "0 0 100 100",
    preserveAspectRatio: "none",
    role: "img",
    "aria-label": plot.label,
  });
  svg.append(shape("path", { class: "opd-lp-grid", d: "M0 0H100M0 50H100M0 100H100" }));
  for (const [x] of plot.marks) {
    svg.append(shape("path", { class: "opd-lp-mark", d: `M${partOf(x, plot.x)} 0V100` }));
  }
  for (const line of plot.lines) {
    const look = `opd-l opd-l-${line.look} opd-l-${line.kind}`;
    svg.append(shape("path", { class: look, d: pathOf(line, plot) }));
  }
  return svg;
};

/**
 * Draw a plot. `mark(x)` moves its cursor (NaN: none), `told` are the words beside its label.
 * @param {Plot} plot
 */
export const linePlot = (plot) => {
  const node = make("figure", "opd-plot");
  const caption = make("figcaption");
  const told = make("span", "opd-soft", plot.told);
  caption.append(make("b", "", plot.label), " ", told);
  const svg = drawLines(plot);
  const cursor = svg.appendChild(shape("path", { class: "opd-lp-now" }));
  const canvas = make("div", "opd-lp-area");
  canvas.append(svg);
  for (const [x, sign] of plot.marks) {
    if (!sign) continue;
    const flag = make("span", "opd-lp-flag", sign);
    flag.style.left = `${partOf(x, plot.x)}%`;
    canvas.append(flag);
  }
  const frame = make("div", "opd-lp-box");
  const [low, high] = plot.y;
  frame.append(make("span", "opd-lp-y", endOf(high, plot.y)));
  frame.append(make("span", "opd-lp-y opd-lp-low", endOf(low, plot.y)), canvas);
  plot.x.forEach((x, i) => {
    const look = i ? "opd-lp-x opd-lp-last" : "opd-lp-x";
    frame.append(make("span", look, String(x).replace("-", "−")));
  });
  node.append(caption, frame);
  /** @param {number} x */
  const mark = (x) =>
    cursor.setAttribute("d", Number.isNaN(x) ? "" : `M${partOf(x, plot.x).toFixed(2)} 0V100`);
  return { node, canvas, told, mark };
};

/** @typedef {ReturnType<typeof linePlot>} DrawnPlot */

/**
 * Return the last value of a line at or before x; NaN where there is none.
 * @param {Line} line
 * @param {number} at
 */
export const valueAt = ({ x, y }, at) => {
  let found = NaN;
  for (let i = 0; i < x.length && x[i] <= at; i++) if (Number.isFinite(y[i])) found = y[i];
  return found;
};
