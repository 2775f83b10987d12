// The scatter of Regimes: points on a canvas under an SVG frame, the two lines, the region, and
// what the pointer and keys do on them.

/** @import { Axis, State } from "./types.js" */
/** @import { AxisScale, Choice, GroupLook } from "./regimes_model.js" */

import { clamp, isModified, make, number, put, shape, svgText } from "./core.js";
import { axisTitle, groupLooks, lineOf, regionBetween, spacedTicks } from "./regimes_model.js";

// Room around the points for ticks and histograms, and within the frame, px.
const LEFT = 46;
const RIGHT = 64;
const TOP = 62;
const BOTTOM = 30;
const PAD = 8;
const BINS = 60; // of a histogram
const BIN_HEIGHT = 24; // px of the tallest bin
const SPRITE = 12; // px of a point with the room around it
const NEAR = 9; // px within which the pointer takes a point
const CELL_ROWS = 4096; // cells of the search grid per row

/** @type {((pen: CanvasRenderingContext2D) => void)[]} */
const SHAPES = [
  (pen) => pen.arc(6, 6, 3, 0, 7),
  (pen) => pen.rect(3.2, 3.2, 5.6, 5.6),
  (pen) => polygon(pen, [6, 2, 10, 9.5, 2, 9.5]),
  (pen) => polygon(pen, [6, 1.8, 10.2, 6, 6, 10.2, 1.8, 6]),
  (pen) => polygon(pen, [6, 10, 10, 2.5, 2, 2.5]),
  (pen) => {
    pen.rect(5, 1.5, 2, 9);
    pen.rect(1.5, 5, 9, 2);
  },
];

/** @param {CanvasRenderingContext2D} pen @param {number[]} corners x and y in turn */
const polygon = (pen, corners) => {
  for (let i = 0; i < corners.length; i += 2) pen.lineTo(corners[i], corners[i + 1]);
};

/**
 * What is drawn: the choice, the size of the stage and where values lie on it, px.
 * @typedef {object} Picture
 * @property {Choice} choice
 * @property {number} width
 * @property {number} height
 * @property {(value: number) => number} toX
 * @property {(value: number) => number} toY
 *
 * Where the points lie, and which rows lie in each cell of a grid.
 * @typedef {{ x: Float32Array, y: Float32Array, cells: Map<number, number[]> }} Points
 *
 * @typedef {"x" | "y"} Direction
 */

/** @param {Choice} choice @param {number} width @param {number} height @returns {Picture} */
const pictureOf = (choice, width, height) => ({
  choice,
  width,
  height,
  toX: (value) => LEFT + PAD + choice.scaleX.at(value) * (width - LEFT - RIGHT - 2 * PAD),
  toY: (value) => TOP + PAD + (1 - choice.scaleY.at(value)) * (height - TOP - BOTTOM - 2 * PAD),
});

// ── Drawing ──────────────────────────────────────────────────────────────────────────────────────

/**
 * Draw the shape of a group on a canvas of its own.
 * @param {GroupLook} look
 * @param {number} ratio device pixels per px
 */
export const sprite = ({ hue, shape: form }, ratio) => {
  const canvas = put(make("canvas"), { width: SPRITE * ratio, height: SPRITE * ratio });
  const pen = canvas.getContext("2d");
  if (!pen) return canvas;
  pen.scale(ratio, ratio);
  pen.fillStyle = `rgb(${hue})`;
  pen.beginPath();
  SHAPES[form % SHAPES.length](pen);
  pen.fill();
  return canvas;
};

/** @param {Picture} picture */
const frameShapes = ({ choice: { x, y }, width, height, toX, toY }) => {
  const right = width - RIGHT;
  const bottom = height - BOTTOM;
  const ticksX = spacedTicks(x, 42 / (right - LEFT)).flatMap((tick) => {
    const at = toX(tick);
    return [
      shape("line", { x1: at, x2: at, y1: bottom, y2: bottom + 4 }),
      svgText(number(tick), { x: at, y: bottom + 14, "text-anchor": "middle" }),
    ];
  });
  const ticksY = spacedTicks(y, 22 / (bottom - TOP)).flatMap((tick) => {
    const at = toY(tick);
    return [
      shape("line", { x1: LEFT - 4, x2: LEFT, y1: at, y2: at }),
      svgText(number(tick), { x: LEFT - 7, y: at + 4, "text-anchor": "end" }),
    ];
  });
  return [
    ...ticksX,
    ...ticksY,
    svgText(`${axisTitle(x)} →`, { x: right, y: bottom + 27, "text-anchor": "end" }),
    svgText(`↑ ${axisTitle(y)}`, { x: 4, y: 11, "text-anchor": "start" }),
    shape("rect", { x: LEFT, y: TOP, width: right - LEFT, height: bottom - TOP }),
  ];
};

/**
 * Return the heights of a histogram's bins: √ of counts, from 0 to 1.
 * @param {AxisScale} scale
 * @param {Axis} axis
 * @param {Uint8Array} shown
 */
const binHeights = (scale, axis, shown) => {
  const counts = new Array(BINS).fill(0);
  for (let row = 0; row < shown.length; row++) {
    if (shown[row]) counts[Math.min(BINS - 1, Math.floor(scale.at(axis.values[row]) * BINS))] += 1;
  }
  const most = Math.sqrt(Math.max(...counts, 1));
  return counts.map((count) => Math.sqrt(count) / most);
};

/** @param {CanvasRenderingContext2D} pen @param {Picture} picture */
const drawHistograms = (pen, { choice, width, height }) => {
  pen.fillStyle = "rgba(128,128,128,0.55)";
  const thickX = (width - LEFT - RIGHT - 2 * PAD) / BINS;
  binHeights(choice.scaleX, choice.x, choice.shown).forEach((share, i) => {
    const tall = BIN_HEIGHT * share;
    pen.fillRect(LEFT + PAD + i * thickX, TOP - 3 - tall, thickX - 1, tall);
  });
  const thickY = (height - TOP - BOTTOM - 2 * PAD) / BINS;
  binHeights(choice.scaleY, choice.y, choice.shown).forEach((share, i) => {
    const y = height - BOTTOM - PAD - (i + 1) * thickY;
    pen.fillRect(width - RIGHT + 3, y, BIN_HEIGHT * share, thickY - 1);
  });
};

/** @param {number} x @param {number} y */
const cellOf = (x, y) => Math.floor(x / NEAR) + CELL_ROWS * Math.floor(y / NEAR);

/** @param {Picture} picture @returns {Points} */
const placePoints = ({ choice: { x, y, shown }, toX, toY }) => {
  const points = {
    x: new Float32Array(shown.length),
    y: new Float32Array(shown.length),
    cells: new Map(),
  };
  for (let row = 0; row < shown.length; row++) {
    if (!shown[row]) continue;
    points.x[row] = toX(x.values[row]);
    points.y[row] = toY(y.values[row]);
    const cell = cellOf(points.x[row], points.y[row]);
    const rows = points.cells.get(cell) ?? [];
    rows.push(row);
    points.cells.set(cell, rows);
  }
  return points;
};

/** @param {HTMLCanvasElement} canvas @param {Picture} picture @param {Points} points */
const drawPoints = (canvas, picture, points) => {
  const { width, height, choice } = picture;
  const { sort, shown } = choice;
  const ratio = Math.min(2, window.devicePixelRatio || 1);
  put(canvas, { width: Math.round(width * ratio), height: Math.round(height * ratio) });
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const pen = canvas.getContext("2d");
  if (!pen) return;
  pen.scale(ratio, ratio);
  drawHistograms(pen, picture);
  const sprites = groupLooks(sort).map((look) => sprite(look, ratio));
  // The more points, the fainter each, so that dense places still show their density.
  pen.globalAlpha = clamp(30 / Math.sqrt(shown.length), 0.13, 0.9);
  for (let row = 0; row < shown.length; row++) {
    if (!shown[row]) continue;
    const left = Math.round(points.x[row]) - SPRITE / 2;
    const top = Math.round(points.y[row]) - SPRITE / 2;
    pen.drawImage(sprites[sort ? sort.index[row] : 0], left, top, SPRITE, SPRITE);
  }
};

/**
 * Return the row of the point nearest to a place of the stage; -1 if none is near.
 * @param {Points} points
 * @param {number} x
 * @param {number} y
 */
const nearestPoint = (points, x, y) => {
  let best = -1;
  let gap = NEAR ** 2;
  const around = [-NEAR, 0, NEAR];
  const cells = around.flatMap((dx) => around.map((dy) => cellOf(x + dx, y + dy)));
  for (const row of cells.flatMap((cell) => points.cells.get(cell) ?? [])) {
    const distance = (points.x[row] - x) ** 2 + (points.y[row] - y) ** 2;
    if (distance < gap) {
      best = row;
      gap = distance;
    }
  }
  return best;
};

/** @param {HTMLElement} node @param {Record<string, number>} box px by side */
const placeBox = (node, box) => {
  for (const [side, value] of Object.entries(box)) node.style.setProperty(side, `${value}px`);
};

// ── The plot ─────────────────────────────────────────────────────────────────────────────────────

/** @param {Direction} direction */
const makeHandle = (direction) =>
  put(make("div", `opd-handle opd-handle-${direction}`), {
    role: "slider",
    tabindex: "0",
    "data-axis": direction,
  });

const makeNodes = () => {
  const stage = make("div", "opd-stage");
  const canvas = make("canvas");
  const frame = put(shape("svg"), { "aria-hidden": "true" });
  const plot = put(make("div", "opd-points"), {
    role: "group",
    tabindex: "0",
    "aria-label":
      "Points. 1 to 4 take a quadrant, arrows move the region, with shift its size, Escape clears",
  });
  const region = make("div", "opd-region");
  const rings = {
    selected: make("div", "opd-ring"),
    hovered: make("div", "opd-ring opd-faint-ring"),
  };
  const handles = { x: makeHandle("x"), y: makeHandle("y") };
  plot.append(region, rings.hovered, rings.selected);
  stage.append(canvas, frame, plot, handles.x, handles.y);
  return { stage, canvas, frame, plot, region, rings, handles };
};

/** @param {ReturnType<typeof makeNodes>} nodes @param {Picture} picture @param {number[]} values */
const placeRegion = ({ region }, { toX, toY }, values) => {
  region.hidden = values.length !== 4;
  if (region.hidden) return;
  const [left, right, low, high] = [toX(values[0]), toX(values[1]), toY(values[2]), toY(values[3])];
  const box = { left: left - LEFT, top: high - TOP, width: right - left, height: low - high };
  placeBox(region, box);
};

/**
 * Put the handle of a line where the line stands.
 * @param {ReturnType<typeof makeNodes>} nodes
 * @param {Picture} picture
 * @param {State} state
 * @param {Direction} direction
 */
const placeHandle = ({ handles }, { choice, width, height, toX, toY }, state, direction) => {
  const axis = choice[direction];
  const value = lineOf(axis, state);
  const handle = put(handles[direction], {
    "aria-label": `line of ${axis.label}`,
    "aria-valuemin": axis.ends[0],
    "aria-valuemax": axis.ends[1],
    "aria-valuenow": clamp(value, ...axis.ends),
    "aria-valuetext": `${number(value)} ${axis.unit}`.trim(),
    "aria-orientation": direction === "x" ? "horizontal" : "vertical",
    "data-value": number(value),
  });
  // The handle's grip is the part of the line that stands out of the frame.
  if (direction === "x") {
    placeBox(handle, { left: toX(value), top: TOP - 26, height: height - TOP - BOTTOM + 26 });
  } else {
    placeBox(handle, { top: toY(value), left: LEFT, width: width - LEFT - RIGHT + 28 });
  }
};

/** @typedef {ReturnType<typeof scatterPlot>} Scatter */

/**
 * Make the scatter. `draw` draws a choice at the stage's present width; the other functions move
 * what lies over the points.
 * @param {State} state
 */
export const scatterPlot = (state) => {
  const nodes = makeNodes();
  const { stage, canvas, frame, plot, rings } = nodes;
  /** @type {Picture} */
  let picture;
  /** @type {Points} */
  let points;
  /** @param {"selected" | "hovered"} name */
  const showRing = (name) => {
    const row = state.get(name);
    rings[name].hidden = !picture.choice.shown[row];
    if (rings[name].hidden) return;
    placeBox(rings[name], { left: points.x[row] - LEFT, top: points.y[row] - TOP });
  };
  const showRegion = (/** @type {number[]} */ region) => placeRegion(nodes, picture, region);
  const showLines = () => {
    placeHandle(nodes, picture, state, "x");
    placeHandle(nodes, picture, state, "y");
  };
  /** @param {Choice} choice */
  const draw = (choice) => {
    const width = Math.max(260, stage.clientWidth);
    const height = clamp(Math.round(0.66 * width), 280, 420);
    picture = pictureOf(choice, width, height);
    points = placePoints(picture);
    stage.style.height = `${height}px`;
    put(frame, { width, height, viewBox: `0 0 ${width} ${height}` });
    frame.replaceChildren(...frameShapes(picture));
    const [right, bottom] = [width - RIGHT, height - BOTTOM];
    placeBox(plot, { left: LEFT, top: TOP, width: right - LEFT, height: bottom - TOP });
    drawPoints(canvas, picture, points);
    showLines();
    showRegion(state.get("region"));
    showRing("selected");
    showRing("hovered");
  };
  /** @param {PointerEvent} event */
  const pointUnder = (event) => {
    const box = plot.getBoundingClientRect();
    return nearestPoint(points, event.clientX - box.left + LEFT, event.clientY - box.top + TOP);
  };
  const choice = () => picture.choice;
  const width = () => picture.width;
  return { ...nodes, draw, showRing, showRegion, showLines, pointUnder, choice, width };
};

// ── Input ────────────────────────────────────────────────────────────────────────────────────────

/**
 * Return where an event lies in the plot: x and y from 0 to 1.
 * @param {HTMLElement} plot
 * @param {PointerEvent} event
 */
const placeOfEvent = (plot, event) => {
  const box = plot.getBoundingClientRect();
  const along = (/** @type {number} */ at, /** @type {number} */ length) =>
    clamp((at - PAD) / (length - 2 * PAD), 0, 1);
  const x = along(event.clientX - box.left, box.width);
  return [x, 1 - along(event.clientY - box.top, box.height)];
};

/**
 * Dragging over points makes a region, a click chooses a point.
 * @param {Scatter} scatter
 * @param {State} state
 * @param {(region: number[]) => void} choose
 */
export const listenToPoints = (scatter, state, choose) => {
  const { plot } = scatter;
  /** @type {number[] | null} */
  let start = null; // of a drag
  /** @param {number[]} from @param {PointerEvent} event */
  const regionTo = (from, event) =>
    regionBetween(scatter.choice(), from, placeOfEvent(plot, event));
  plot.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    plot.setPointerCapture(event.pointerId);
    start = placeOfEvent(plot, event);
  });
  plot.addEventListener("pointermove", (event) => {
    if (start) scatter.showRegion(regionTo(start, event));
    else state.set("hovered", scatter.pointUnder(event));
  });
  plot.addEventListener("pointerup", (event) => {
    if (!start) return;
    const from = start;
    start = null;
    const to = placeOfEvent(plot, event);
    const box = scatter.stage.getBoundingClientRect();
    if (Math.hypot((to[0] - from[0]) * box.width, (to[1] - from[1]) * box.height) > 5) {
      choose(regionTo(from, event));
      return;
    }
    const row = scatter.pointUnder(event);
    if (row >= 0) state.set("selected", row);
    else choose([]);
    scatter.showRegion(state.get("region"));
  });
  plot.addEventListener("pointerleave", () => {
    if (!start) state.set("hovered", -1);
  });
};

/** @type {Record<string, number[]>} */
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
const KEY_STEP = 1 / 40; // of the axis

/**
 * Return the region that an arrow key leads to: moved, or with `grows` its right and upper ends.
 * @param {Choice} choice
 * @param {number[]} region
 * @param {number[]} arrow
 * @param {boolean} grows
 */
const nudgedRegion = (choice, region, arrow, grows) => {
  const { scaleX, scaleY } = choice;
  const [left, right, low, high] =
    region.length === 4
      ? [scaleX.at(region[0]), scaleX.at(region[1]), scaleY.at(region[2]), scaleY.at(region[3])]
      : [0.4, 0.6, 0.4, 0.6];
  const [dx, dy] = arrow.map((direction) => direction * KEY_STEP);
  const from = grows ? [left, low] : [clamp(left + dx, 0, 1), clamp(low + dy, 0, 1)];
  const to = [Math.max(left, clamp(right + dx, 0, 1)), Math.max(low, clamp(high + dy, 0, 1))];
  return regionBetween(choice, from, to);
};

/**
 * @param {Scatter} scatter
 * @param {State} state
 * @param {(region: number[]) => void} choose
 * @param {(quadrant: number) => void} chooseQuadrant
 */
export const listenToPlotKeys = (scatter, state, choose, chooseQuadrant) => {
  scatter.plot.addEventListener("keydown", (event) => {
    if (isModified(event)) return;
    const arrow = ARROWS[event.key];
    const quadrant = ["1", "2", "3", "4"].indexOf(event.key);
    if (event.key === "Escape") choose([]);
    else if (quadrant >= 0) chooseQuadrant(quadrant);
    else if (arrow) {
      choose(nudgedRegion(scatter.choice(), state.get("region"), arrow, event.shiftKey));
    } else return;
    event.preventDefault();
  });
};

/**
 * Drags and keys move the line of an axis; Home takes it back to where it began.
 * @param {Scatter} scatter
 * @param {State} state
 * @param {Direction} direction
 */
const listenToHandle = ({ plot, handles, choice }, state, direction) => {
  const handle = handles[direction];
  const axis = () => choice()[direction];
  const scale = () => (direction === "x" ? choice().scaleX : choice().scaleY);
  /** @param {number} value */
  const setLine = (value) =>
    state.set("thresholds", { ...state.get("thresholds"), [axis().key]: value });
  /** @param {number} place */
  const moveTo = (place) => setLine(scale().of(clamp(place, 0, 1)));
  let isHeld = false;
  handle.addEventListener("pointerdown", (event) => {
    isHeld = true;
    handle.setPointerCapture(event.pointerId);
    event.preventDefault();
    handle.focus();
  });
  handle.addEventListener("pointermove", (event) => {
    if (isHeld) moveTo(placeOfEvent(plot, event)[direction === "x" ? 0 : 1]);
  });
  handle.addEventListener("pointerup", () => {
    isHeld = false;
  });
  handle.addEventListener("keydown", (event) => {
    if (isModified(event)) return;
    const step = event.shiftKey ? 0.1 : 0.01;
    /** @type {Record<string, number>} */
    const steps = {
      ArrowRight: step,
      ArrowUp: step,
      ArrowLeft: -step,
      ArrowDown: -step,
      PageUp: 0.1,
      PageDown: -0.1,
    };
    if (event.key === "Home") setLine(axis().start);
    else if (event.key in steps) moveTo(scale().at(lineOf(axis(), state)) + steps[event.key]);
    else return;
    event.preventDefault();
  });
};

/** @param {Scatter} scatter @param {State} state */
export const listenToHandles = (scatter, state) => {
  listenToHandle(scatter, state, "x");
  listenToHandle(scatter, state, "y");
};
