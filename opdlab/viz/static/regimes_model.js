// The numbers behind Regimes: scales of the axes, which tokens are shown, quadrants, regions, and
// the words around a token. Nothing here draws.

/** @import { Axis, Group, RegimesPayload, Sort, State, Text } from "./types.js" */

import { clamp, completionAt, groupsOf, HUES, KIND_HUES, sum } from "./core.js";

const CONTEXT = 8; // glyphs before and after a token in the list

/**
 * The way from a value to its place on the axis, 0 to 1, and back.
 * @typedef {{ at: (value: number) => number, of: (place: number) => number }} AxisScale
 *
 * What the reader chose to see.
 * @typedef {object} Choice
 * @property {Axis} x
 * @property {Axis} y
 * @property {AxisScale} scaleX
 * @property {AxisScale} scaleY
 * @property {Sort | undefined} sort
 * @property {Uint8Array} shown 1 for rows that have both values and are not hidden
 *
 * The hue of a group as [red, green, blue], and the number of its shape.
 * @typedef {{ hue: number[], shape: number }} GroupLook
 */

// ── Scales ───────────────────────────────────────────────────────────────────────────────────────

/** @type {Record<string, (soft: number) => [(value: number) => number, (bent: number) => number]>} */
const BENDS = {
  linear: () => [(value) => value, (bent) => bent],
  log: () => [(value) => Math.log(Math.max(value, 1e-30)), Math.exp],
  asinh: (soft) => [(value) => Math.asinh(value / soft), (bent) => soft * Math.sinh(bent)],
};

/**
 * Return the scale of an axis; values beyond its ends, infinities too, lie at the ends.
 * @param {Pick<Axis, "scale" | "soft" | "ends">} axis
 * @returns {AxisScale}
 */
export const scaleOf = ({ scale, soft, ends }) => {
  const [bend, unbend] = BENDS[scale](soft);
  const low = bend(ends[0]);
  const high = bend(ends[1]);
  return {
    at: (value) => clamp((bend(value) - low) / (high - low), 0, 1),
    of: (place) => unbend(low + place * (high - low)),
  };
};

/** @param {number} low @param {number} high */
const linearTicks = (low, high) => {
  const power = 10 ** Math.floor(Math.log10((high - low) / 3));
  const step = power * ((high - low) / power > 6 ? 2 : 1);
  const ticks = [];
  for (let tick = Math.ceil(low / step) * step; tick <= high + 1e-9 * step; tick += step) {
    ticks.push(Number(tick.toPrecision(6)));
  }
  return ticks;
};

/**
 * Return ticks of an axis, the rounder ones first where it is not linear.
 * @param {Pick<Axis, "scale" | "ends">} axis
 */
export const ticksOf = ({ scale, ends: [low, high] }) => {
  if (scale === "linear") return linearTicks(low, high);
  const positive = [1, 2, 5].flatMap((digit) =>
    Array.from({ length: 9 }, (_, i) => Number((digit * 10 ** (5 - i)).toPrecision(1))),
  );
  const ticks = scale === "log" ? positive : [0, ...positive.flatMap((tick) => [tick, -tick])];
  return ticks.filter((tick) => tick >= low && tick <= high);
};

/**
 * Return ticks that keep apart by a share of the axis, the first ones first.
 * @param {Axis} axis
 * @param {number} gap
 */
export const spacedTicks = (axis, gap) => {
  const scale = scaleOf(axis);
  /** @type {number[]} */
  const kept = [];
  for (const tick of ticksOf(axis)) {
    const place = scale.at(tick);
    if (kept.every((other) => Math.abs(scale.at(other) - place) >= gap)) kept.push(tick);
  }
  return kept;
};

/** @param {Axis} axis */
export const axisTitle = ({ label, unit }) => (unit ? `${label}, ${unit}` : label);

// ── What is chosen ───────────────────────────────────────────────────────────────────────────────

/**
 * @param {RegimesPayload} data
 * @param {State} state
 * @returns {Choice}
 */
export const choiceOf = ({ axes, sorts }, state) => {
  const axisOf = (/** @type {"x" | "y"} */ name) =>
    axes.find(({ key }) => key === state.get(name)) ?? axes[0];
  const [x, y] = [axisOf("x"), axisOf("y")];
  const sort = sorts.find(({ key }) => key === state.get("by"));
  const hidden = new Set(state.get("hidden"));
  const isHidden = sort ? sort.names.map((name) => hidden.has(name)) : [];
  const shown = Uint8Array.from(x.values, (value, row) => {
    const hasValues = !Number.isNaN(value) && !Number.isNaN(y.values[row]);
    return Number(hasValues && !(sort && isHidden[sort.index[row]]));
  });
  return { x, y, scaleX: scaleOf(x), scaleY: scaleOf(y), sort, shown };
};

/**
 * Return where the line of an axis stands.
 * @param {Axis} axis
 * @param {State} state
 */
export const lineOf = (axis, state) => state.get("thresholds")[axis.key] ?? axis.start;

/**
 * Return a hue and a shape per group; groups without a hue of their own take the next free one.
 * @param {Sort | undefined} sort
 * @returns {GroupLook[]}
 */
export const groupLooks = (sort) => {
  const names = sort ? sort.names : ["tokens"];
  let next = 0;
  return names.map((_, i) => {
    const known = HUES[sort ? sort.hues[i] : "amount"];
    const hue = known ?? KIND_HUES[next % KIND_HUES.length];
    if (!known) next += 1;
    return { hue, shape: i };
  });
};

// ── Quadrants and regions ────────────────────────────────────────────────────────────────────────

/**
 * Return for each quadrant its tokens and the sum of every amount. Quadrants: low x high y, high x
 * high y, low x low y, high x low y.
 * @param {Choice} choice
 * @param {number} lineX
 * @param {number} lineY
 * @param {Record<string, ArrayLike<number>>} amounts
 */
export const quadrantSums = ({ x, y, shown }, lineX, lineY, amounts) => {
  const columns = Object.values(amounts);
  const sums = Array.from({ length: 4 }, () => [0, ...columns.map(() => 0)]);
  for (let row = 0; row < shown.length; row++) {
    if (!shown[row]) continue;
    const quadrant = (y.values[row] >= lineY ? 0 : 2) + (x.values[row] >= lineX ? 1 : 0);
    sums[quadrant][0] += 1;
    for (let i = 0; i < columns.length; i++) sums[quadrant][i + 1] += columns[i][row];
  }
  return sums;
};

/**
 * Return how many tokens, and how much of every amount, all quadrants have together.
 * @param {number[][]} sums
 */
export const totalsOf = (sums) => sums[0].map((_, i) => sum(sums.map((one) => one[i])));

/**
 * Return the region between two places of the plot, as [left, right, low, high] in values. At the
 * edge of the plot a region ends where the axis ends.
 * @param {Choice} choice
 * @param {number[]} from [x, y], 0 to 1
 * @param {number[]} to
 */
export const regionBetween = ({ x, y, scaleX, scaleY }, from, to) => {
  /** @param {Axis} axis @param {AxisScale} scale @param {number} i */
  const endsOf = (axis, scale, i) => {
    const low = Math.min(from[i], to[i]);
    const high = Math.max(from[i], to[i]);
    return [low <= 0 ? axis.ends[0] : scale.of(low), high >= 1 ? axis.ends[1] : scale.of(high)];
  };
  return [...endsOf(x, scaleX, 0), ...endsOf(y, scaleY, 1)];
};

/**
 * Return the region of a quadrant.
 * @param {Choice} choice
 * @param {State} state
 * @param {number} quadrant
 */
export const quadrantRegion = (choice, state, quadrant) => {
  const lineX = choice.scaleX.at(lineOf(choice.x, state));
  const lineY = choice.scaleY.at(lineOf(choice.y, state));
  const justBelow = 1e-6;
  const from = [quadrant % 2 ? lineX : 0, quadrant < 2 ? lineY : 0];
  const to = [quadrant % 2 ? 1 : lineX - justBelow, quadrant < 2 ? 1 : lineY - justBelow];
  return regionBetween(choice, from, to);
};

/**
 * Return the rows that are shown in a region; infinities lie at the ends of the axes.
 * @param {Choice} choice
 * @param {number[]} region
 */
export const rowsInRegion = ({ x, y, shown }, [left, right, low, high]) => {
  const rows = [];
  for (let row = 0; row < shown.length; row++) {
    const atX = clamp(x.values[row], ...x.ends);
    const atY = clamp(y.values[row], ...y.ends);
    if (shown[row] && atX >= left && atX <= right && atY >= low && atY <= high) rows.push(row);
  }
  return rows;
};

/**
 * Return the first and last row of each run of neighbouring rows.
 * @param {number[]} rows
 */
export const runsOf = (rows) => {
  /** @type {number[]} */
  const runs = [];
  for (const row of rows) {
    if (row - 1 === runs.at(-1)) runs[runs.length - 1] = row;
    else runs.push(row, row);
  }
  return runs;
};

// ── Words around a token ─────────────────────────────────────────────────────────────────────────

/**
 * Return the function that gives a row's completion and the glyphs before, at and after it.
 * @param {Text} text
 */
export const contextOf = (text) => {
  /** @type {Map<number, Group[]>} */
  const cache = new Map();
  return (/** @type {number} */ row) => {
    const completion = completionAt(text, row) ?? text.texts[0];
    const { first, size } = completion;
    const groups = cache.get(first) ?? groupsOf(text, first, size);
    cache.set(first, groups);
    let low = 0;
    let high = groups.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (groups[middle].first <= row) low = middle;
      else high = middle - 1;
    }
    return {
      completion,
      before: groups.slice(Math.max(0, low - CONTEXT), low),
      here: groups[low],
      after: groups.slice(low + 1, low + 1 + CONTEXT),
    };
  };
};
