// Lines over steps as SVG that stretches with its box, so nothing is measured. `plot` is what `lines.Plot.data` makes.
// linePlot(plot) gives { node, mark(x): moves the cursor, none for NaN; figure: the plot's caption for words }.

import { clamp, make, number, shape } from "./core.js";

export const partOf = (value, [low, high]) => 100 * clamp((value - low) / (high - low || 1), 0, 1);

const penOf = ({ x, y, kind }, plot) => {
  let d = "";
  let pen = false;
  for (let i = 0; i < x.length; i++) {
    if (!Number.isFinite(y[i])) {
      pen = false;
      continue;
    }
    const point = `${partOf(x[i], plot.x).toFixed(2)} ${(100 - partOf(y[i], plot.y)).toFixed(2)}`;
    d += pen && kind !== "dots" ? `L${point}` : `M${point}h0`;
    pen = true;
  }
  return d;
};

// A number at an end of the scale; what is nothing beside the other end is 0.
const endOf = (value, [low, high]) => number(Math.abs(value) < (high - low) / 1000 ? 0 : value);

export const linePlot = (plot) => {
  const node = make("figure", "opd-plot");
  const caption = make("figcaption");
  const told = make("span", "opd-soft", plot.told);
  const frame = make("div", "opd-lp-box");
  const canvas = make("div", "opd-lp-area");
  const svg = shape("svg", {
    viewBox: "0 0 100 100",
    preserveAspectRatio: "none",
    role: "img",
    "aria-label": plot.label,
  });
  const now = shape("path", { class: "opd-lp-now" });
  caption.append(make("b", "", plot.label), " ", told);
  svg.append(shape("path", { class: "opd-lp-grid", d: "M0 0H100M0 50H100M0 100H100" }));
  for (const [x] of plot.marks)
    svg.append(shape("path", { class: "opd-lp-mark", d: `M${partOf(x, plot.x)} 0V100` }));
  for (const line of plot.lines)
    svg.append(
      shape("path", { class: `opd-l opd-l-${line.look} opd-l-${line.kind}`, d: penOf(line, plot) }),
    );
  svg.append(now);
  canvas.append(svg);
  for (const [x, sign] of plot.marks.filter((mark) => mark[1])) {
    const flag = make("span", "opd-lp-flag", sign);
    flag.style.left = `${partOf(x, plot.x)}%`;
    canvas.append(flag);
  }
  frame.append(
    make("span", "opd-lp-y", endOf(plot.y[1], plot.y)),
    make("span", "opd-lp-y opd-lp-low", endOf(plot.y[0], plot.y)),
    canvas,
  );
  frame.append(
    ...plot.x.map((x, i) =>
      make("span", i ? "opd-lp-x opd-lp-last" : "opd-lp-x", String(x).replace("-", "−")),
    ),
  );
  node.append(caption, frame);
  const mark = (x) =>
    now.setAttribute("d", Number.isNaN(x) ? "" : `M${partOf(x, plot.x).toFixed(2)} 0V100`);
  return { node, canvas, told, mark };
};

// The last value of a line at or before x; NaN where there is none.
export const valueAt = ({ x, y }, at) => {
  let found = NaN;
  for (let i = 0; i < x.length && x[i] <= at; i++) if (Number.isFinite(y[i])) found = y[i];
  return found;
};
