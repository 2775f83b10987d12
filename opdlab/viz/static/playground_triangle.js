// The triangle of the playground: distributions over three outcomes, a field of arrows, the way of
// one student, and two dots to drag.

/** @import { State } from "./types.js" */

import { clamp, put, shape, sum, svgText } from "./core.js";
import { students, tempered } from "./toys.js";

const OUTCOMES = ["a", "b", "c"];
const LEFT = 6; // of the corners, in units of the picture
const BASE = 80;
const HEIGHT = 74;
const WIDTH = 88;
const CORNERS = [
  [LEFT, BASE],
  [LEFT + WIDTH, BASE],
  [LEFT + WIDTH / 2, BASE - HEIGHT],
];
const LEAST = 0.02; // share that every outcome keeps
const KEY_STEP = 0.03;
const LONGEST_ARROW = 6.5;

// ── Model ────────────────────────────────────────────────────────────────────────────────────────

/**
 * Return where a distribution lies, or how a change of it moves.
 * @param {number[]} p
 * @returns {[x: number, y: number]}
 */
export const spotOf = (p) => [
  sum(p.map((share, k) => share * CORNERS[k][0])),
  sum(p.map((share, k) => share * CORNERS[k][1])),
];

/** @param {number[]} shares */
const normalised = (shares) => {
  const kept = shares.map((share) => Math.max(share, LEAST));
  const total = sum(kept);
  return kept.map((share) => share / total);
};

/**
 * Return the distribution nearest to a place, inside of the triangle.
 * @param {number} x
 * @param {number} y
 */
export const distributionAt = (x, y) => {
  const third = clamp((BASE - y) / HEIGHT, 0, 1);
  const second = clamp((x - LEFT - (WIDTH / 2) * third) / WIDTH, 0, 1 - third);
  return normalised([1 - second - third, second, third]);
};

/** Shares that each key gives to the outcomes, in units of half a step. @type {Record<string, number[]>} */
const NUDGES = {
  ArrowLeft: [2, -1, -1],
  ArrowRight: [-1, 2, -1],
  ArrowUp: [-1, -1, 2],
  ArrowDown: [1, 1, -2],
};

/** @param {number[]} p @param {number[]} nudge */
const nudged = (p, nudge) => normalised(p.map((share, k) => share + (nudge[k] * KEY_STEP) / 2));

// ── Drawing ──────────────────────────────────────────────────────────────────────────────────────

/** @param {number} x @param {number} y */
const pair = (x, y) => `${x.toFixed(2)} ${y.toFixed(2)}`;

/**
 * Return the path of an arrow.
 * @param {number[]} from
 * @param {number[]} move
 * @param {number} length
 */
const arrowPath = ([x, y], move, length) => {
  if (length < 0.4) return "";
  const size = Math.hypot(...move) || 1;
  const [ux, uy] = [move[0] / size, move[1] / size];
  const tip = pair(x + length * ux, y + length * uy);
  const head = Math.min(1.6, length / 2);
  const wing = (/** @type {number} */ side) =>
    `M${tip}l${pair(head * (-ux + side * 0.6 * uy), head * (-uy - side * 0.6 * ux))}`;
  return `M${pair(x, y)}L${tip}${wing(1)}${wing(-1)}`;
};

/** @param {number[][]} field */
const arrowsPath = (field) => {
  const moves = field.map(spotOf);
  const most = Math.max(...moves.map((move) => Math.hypot(...move))) || 1;
  const paths = students().map((p, i) => {
    const length = LONGEST_ARROW * Math.sqrt(Math.hypot(...moves[i]) / most);
    return arrowPath(spotOf(p), moves[i], length);
  });
  return paths.join("");
};

/**
 * Make a dot that is dragged, or moved by arrow keys.
 * @param {"teacher" | "student"} who
 * @param {SVGSVGElement} svg
 * @param {State} state
 */
const draggedDot = (who, svg, state) => {
  const look = `opd-dot opd-dot-${who}`;
  const dot = shape("circle", { class: look, r: 3, tabindex: 0, role: "button" });
  dot.addEventListener("pointerdown", (event) => {
    dot.setPointerCapture(event.pointerId);
    event.preventDefault();
    dot.focus();
  });
  dot.addEventListener("pointermove", (event) => {
    const toPicture = svg.getScreenCTM()?.inverse();
    if (!toPicture || !dot.hasPointerCapture(event.pointerId)) return;
    const { x, y } = new DOMPoint(event.clientX, event.clientY).matrixTransform(toPicture);
    state.set(who, distributionAt(x, y));
  });
  dot.addEventListener("keydown", (event) => {
    const nudge = NUDGES[event.key];
    if (!nudge) return;
    event.preventDefault();
    state.set(who, nudged(state.get(who), nudge));
  });
  const update = () => {
    const p = state.get(who);
    const [x, y] = spotOf(p);
    const shares = p.map((share, k) => `${OUTCOMES[k]} ${Math.round(100 * share)} %`).join(", ");
    const label = `${who} at ${shares}; arrow keys move it`;
    put(dot, { cx: x, cy: y, "aria-label": label });
  };
  return { dot, update };
};

/**
 * Make the triangle of one loss.
 * @param {string} name
 * @param {State} state
 */
export const trianglePlot = (name, state) => {
  const svg = shape("svg", {
    class: "opd-tri",
    viewBox: "0 0 100 88",
    role: "group",
    "aria-label": `Where ${name} moves a student of three outcomes`,
  });
  const border = `M${CORNERS.map((corner) => corner.join(" ")).join("L")}Z`;
  const arrows = shape("path", { class: "opd-arrows" });
  const walk = shape("path", { class: "opd-walk" });
  const ghost = shape("circle", { class: "opd-ghost", r: 2.4 });
  svg.append(shape("path", { class: "opd-side-line", d: border }), arrows, walk, ghost);
  CORNERS.forEach(([x, y], k) => {
    const where = { x, y: k === 2 ? y - 2 : y + 6, "text-anchor": "middle" };
    svg.append(svgText(OUTCOMES[k], where));
  });
  const dots = [draggedDot("teacher", svg, state), draggedDot("student", svg, state)];
  svg.append(...dots.map(({ dot }) => dot));
  /** @param {{ field: number[][], walk: number[][] }} result */
  const update = ({ field, walk: way }) => {
    put(arrows, { d: arrowsPath(field) });
    put(walk, { d: `M${way.map((p) => pair(...spotOf(p))).join("L")}` });
    // A ring where the teacher's temperature puts it.
    const logits = state.get("teacher").map(Math.log);
    const [x, y] = spotOf(tempered(logits, state.get("temperature")).map(Math.exp));
    put(ghost, { cx: x, cy: y });
    for (const dot of dots) dot.update();
  };
  return { node: svg, update };
};
