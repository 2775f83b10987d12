// A row of marks along one number, such as the distance of a window or the weight of a chunk, with
// a line to drag or without; and the strip of the completion that is looked at.

/** @import { Completion, StripState, Text } from "./types.js" */
/** @import { Strip } from "./strip.js" */

import {
  clamp,
  completionAt,
  isModified,
  make,
  makeButton,
  number,
  promptBox,
  put,
  rowOfEvent,
  shape,
  svgText,
} from "./core.js";
import { TALL_STRIP, tokenStrip } from "./strip.js";

const ROW_HEIGHT = 64; // px
const DOT = 9; // px of a mark
const EDGE = 12; // px of room at the ends of the row
const STACKED = 5; // marks that are shown on one another

/**
 * A mark: the row that a click chooses, its number, filled or not, and words for the pointer.
 * @typedef {{ row: number, value: number, solid: boolean, told?: string }} Dot
 */

// ── Model ────────────────────────────────────────────────────────────────────────────────────────

/**
 * Return the columns with more marks than are shown. Neighbours count as one, so that their numbers
 * do not collide.
 * @param {Map<number, number>} stacks marks by column
 * @returns {{ from: number, to: number, hidden: number }[]}
 */
export const crowdedColumns = (stacks) => {
  /** @type {{ from: number, to: number, hidden: number }[]} */
  const crowded = [];
  for (const [column, count] of [...stacks].sort(([a], [b]) => a - b)) {
    const hidden = count - STACKED;
    const last = crowded.at(-1);
    if (hidden <= 0) continue;
    if (last && column - last.to < 3) {
      last.to = column;
      last.hidden += hidden;
    } else {
      crowded.push({ from: column, to: column, hidden });
    }
  }
  return crowded;
};

/**
 * Return round numbers from 0 to top, about four.
 * @param {number} top
 */
export const roundTicks = (top) => {
  const rough = top / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 5].find((by) => by * power >= rough * 0.999) ?? 10);
  const ticks = [];
  for (let tick = 0; tick <= top * 1.001; tick += step) ticks.push(tick);
  return ticks;
};

// The axis from 0 to `top` on a row of `width` px.
/** @param {number} top @param {number} width */
const axisOf = (top, width) => ({
  toX: (/** @type {number} */ value) => EDGE + (value / top) * (width - 2 * EDGE),
  ofX: (/** @type {number} */ x) => clamp((x - EDGE) / (width - 2 * EDGE), 0, 1) * top,
});

// ── Drawing ──────────────────────────────────────────────────────────────────────────────────────

/**
 * Draw marks from the least on, so that equal ones stack.
 * @param {Dot[]} dots
 * @param {number | undefined} selected
 * @param {(value: number) => number} toX
 */
const drawDots = (dots, selected, toX) => {
  /** @type {Map<number, number>} */
  const stacks = new Map();
  const nodes = [...dots]
    .sort((a, b) => a.value - b.value)
    .map(({ row, value, solid, told }) => {
      const column = Math.round((toX(value) - EDGE) / DOT);
      const level = stacks.get(column) ?? 0;
      stacks.set(column, level + 1);
      const x = EDGE + column * DOT;
      const y = ROW_HEIGHT - 7 - Math.min(level, STACKED - 1) * DOT;
      const look = `opd-dot-mark${solid ? " opd-solid" : ""}${row === selected ? " opd-on" : ""}`;
      const mark = shape("path", {
        d: "M0 -4.5 L4.5 0 L0 4.5 L-4.5 0 Z",
        transform: `translate(${x} ${y})`,
        "data-row": row,
        class: look,
      });
      if (told) mark.appendChild(shape("title")).textContent = told;
      return mark;
    });
  return { nodes, stacks };
};

/**
 * Write how many marks are not shown. `lineX` is where a line would strike through the number.
 * @param {Map<number, number>} stacks
 * @param {number} lineX NaN where there is no line
 */
const drawCounts = (stacks, lineX) =>
  crowdedColumns(stacks).map(({ from, to, hidden }) => {
    const x = EDGE + ((from + to) / 2) * DOT;
    const isStruck = Math.abs(x - lineX) < 16;
    return svgText(`+${hidden}`, {
      x: isStruck ? lineX + 4 : x,
      y: ROW_HEIGHT - 6 - STACKED * DOT,
      class: "opd-dots-more",
      "text-anchor": isStruck ? "start" : "middle",
    });
  });

// ── Input ────────────────────────────────────────────────────────────────────────────────────────

/**
 * Drags and keys move the line.
 * @param {HTMLElement} handle
 * @param {(event: PointerEvent) => void} drag
 * @param {(hundredths: number) => void} nudge
 */
const listenToHandle = (handle, drag, nudge) => {
  let isHeld = false;
  handle.addEventListener("pointerdown", (event) => {
    isHeld = true;
    handle.setPointerCapture(event.pointerId);
    event.preventDefault();
    handle.focus();
  });
  handle.addEventListener("pointermove", (event) => {
    if (isHeld) drag(event);
  });
  handle.addEventListener("pointerup", () => {
    isHeld = false;
  });
  handle.addEventListener("keydown", (event) => {
    /** @type {Record<string, number>} */
    const steps = {
      ArrowRight: 1,
      ArrowUp: 1,
      ArrowLeft: -1,
      ArrowDown: -1,
      PageUp: 10,
      PageDown: -10,
    };
    const step = steps[event.key];
    if (step === undefined || isModified(event)) return;
    event.preventDefault();
    nudge(step);
  });
};

/**
 * Make a row of marks. With `move` there is a line at the limit of `draw`.
 * @param {object} options
 * @param {(row: number) => void} options.choose hears clicks on marks
 * @param {((value: number) => void) | null} [options.move] hears drags of the line
 * @param {string} [options.name] of the line
 * @param {string} [options.sign] of the line
 * @param {number} [options.most] end of the axis; 0 to fit the marks
 */
export const dotLine = ({ choose, move = null, name = "", sign = "", most = 0 }) => {
  const node = make("div", "opd-dots");
  const svg = put(shape("svg"), { "aria-hidden": "true" });
  const handle = put(make("div", "opd-line-handle"), {
    role: "slider",
    tabindex: "0",
    "aria-label": name,
  });
  let top = 1;
  let width = 0;
  let limit = 0;
  node.append(svg);
  /** @param {Dot[]} dots @param {number | undefined} selected @param {number} [newLimit] */
  const draw = (dots, selected, newLimit = 0) => {
    limit = newLimit;
    width = Math.max(220, node.clientWidth);
    top = most || Math.max(...dots.map(({ value }) => value), limit, 0.01) * 1.04;
    const { toX } = axisOf(top, width);
    const floor = { x1: EDGE, x2: width - EDGE, y1: ROW_HEIGHT + 0.5, y2: ROW_HEIGHT + 0.5 };
    const { nodes, stacks } = drawDots(dots, selected, toX);
    const counts = drawCounts(stacks, move ? toX(limit) : NaN);
    const ticks = roundTicks(top).map((tick) =>
      svgText(number(tick), { x: toX(tick), y: ROW_HEIGHT + 13, "text-anchor": "middle" }),
    );
    put(svg, { width, height: ROW_HEIGHT + 16 });
    svg.replaceChildren(shape("line", floor), ...nodes, ...counts, ...ticks);
    handle.style.left = `${toX(limit)}px`;
    put(handle, {
      "aria-valuemin": 0,
      "aria-valuemax": top.toPrecision(3),
      "aria-valuenow": limit,
      "aria-valuetext": number(limit),
      "data-value": `${sign} ${number(limit)}`,
    });
  };
  svg.addEventListener("click", (event) => {
    const row = rowOfEvent(event);
    if (row >= 0) choose(row);
  });
  if (move) {
    node.append(handle);
    const drag = (/** @type {PointerEvent} */ event) =>
      move(axisOf(top, width).ofX(event.clientX - node.getBoundingClientRect().left));
    listenToHandle(handle, drag, (step) => move(clamp(limit + (step * top) / 100, 0, top)));
  }
  return { node, draw, width: () => width };
};

/**
 * Make the buttons ‹ and › that go through things in an order.
 * @param {string} thing
 * @param {(step: number) => void} go
 */
export const walkButtons = (thing, go) => {
  const node = put(make("div", "opd-buttons opd-steps"), {
    role: "group",
    "aria-label": `Go through the ${thing}s`,
  });
  const previous = put(makeButton("", "‹"), { "aria-label": `Previous ${thing}` });
  const next = put(makeButton("", "›"), { "aria-label": `Next ${thing}` });
  previous.addEventListener("click", () => go(-1));
  next.addEventListener("click", () => go(1));
  node.append(previous, next);
  return node;
};

// ── The strip of the completion that is looked at ────────────────────────────────────────────────

// Scroll a strip, not the page, to one of its rows.
/** @param {Strip} strip @param {number} row */
const keepInSight = ({ node, nodes, first }, row) => {
  const token = nodes[row - first]?.getClientRects()[0];
  const frame = node.getBoundingClientRect();
  if (token && (token.top < frame.top + 20 || token.bottom > frame.bottom - 20)) {
    node.scrollTop += token.top - frame.top - frame.height / 3;
  }
};

/**
 * Make a place for the strip of whichever completion a row lies in. Each strip is made once, when
 * it is first looked at.
 * @param {object} options
 * @param {Text} options.text
 * @param {StripState} options.state
 * @param {(strip: Strip) => void} options.fill colours a new strip
 */
export const stripPlace = ({ text, state, fill }) => {
  const node = make("div", "opd-place");
  const prompt = promptBox("");
  const holder = make("div", "opd-place-strip");
  /** @type {Map<number, Strip>} */
  const strips = new Map();
  /** @type {Completion | null} */
  let shown = null;
  node.append(prompt, holder);
  /** @param {Completion} completion */
  const stripOf = ({ first, size, finish }) => {
    const old = strips.get(first);
    if (old) return old;
    const strip = tokenStrip({ text, first, size, finish, state });
    strips.set(first, strip);
    fill(strip);
    strip.node.classList.toggle("opd-tall", size > TALL_STRIP);
    return strip;
  };
  /** @param {number} row */
  const open = (row) => {
    const completion = completionAt(text, row);
    if (!completion) return null;
    const strip = stripOf(completion);
    if (shown !== completion) {
      shown = completion;
      prompt.textContent = completion.prompt;
      holder.replaceChildren(strip.node);
    }
    if (completion.size > TALL_STRIP) keepInSight(strip, row);
    return { completion, strip };
  };
  return { node, open, all: () => [...strips.values()] };
};
