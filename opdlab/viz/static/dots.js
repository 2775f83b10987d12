// A row of marks along one number, such as the distance of a window or the weight of a chunk, with a line to drag or without.

import { clamp, make, number, put, shape } from "./core.js";
import { tokenStrip } from "./strip.js";

const DOTS_HIGH = 64;
const DOT = 9;
const DOTS_EDGE = 12; // height of the row, px of a mark, room at its ends

// Columns with more marks than are shown, neighbours as one, so that their counts do not collide: [{ from, to, hidden }].
const crowded = (stacks) => {
  const out = [];
  for (const [column, n] of [...stacks].sort(([a], [b]) => a - b)) {
    if (n <= 5) continue;
    const last = out.at(-1);
    if (last && column - last.to < 3)
      Object.assign(last, { to: column, hidden: last.hidden + n - 5 });
    else out.push({ from: column, to: column, hidden: n - 5 });
  }
  return out;
};

// { node, draw(points, selected, limit), width() }. A point is { row, value, solid, told }; `choose(row)` hears clicks. With
// `move(value)` there is a line at `limit`, named `name` and marked with the sign `sign`.
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
  let held = false;
  node.append(svg, ...(move ? [handle] : []));
  const toX = (v) => DOTS_EDGE + (v / top) * (width - 2 * DOTS_EDGE);
  const ofX = (x) => clamp((x - DOTS_EDGE) / (width - 2 * DOTS_EDGE), 0, 1) * top;
  const ticks = () => {
    const rough = top / 4;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((by) => by * power >= rough * 0.999);
    const out = [];
    for (let v = 0; v <= top * 1.001; v += step) {
      const label = shape("text", { x: toX(v), y: DOTS_HIGH + 13, "text-anchor": "middle" });
      label.textContent = number(v);
      out.push(label);
    }
    return out;
  };
  const draw = (points, selected, limit = 0) => {
    width = Math.max(220, node.clientWidth);
    top = most || Math.max(...points.map(({ value }) => value), limit, 0.01) * 1.04;
    const stacks = new Map();
    const nodes = [
      shape("line", {
        x1: DOTS_EDGE,
        x2: width - DOTS_EDGE,
        y1: DOTS_HIGH + 0.5,
        y2: DOTS_HIGH + 0.5,
      }),
    ];
    for (const { row, value, solid, told } of [...points].sort((a, b) => a.value - b.value)) {
      const column = Math.round((toX(value) - DOTS_EDGE) / DOT);
      const level = stacks.get(column) ?? 0;
      stacks.set(column, level + 1);
      const mark = shape("path", {
        d: "M0 -4.5 L4.5 0 L0 4.5 L-4.5 0 Z",
        transform: `translate(${DOTS_EDGE + column * DOT} ${DOTS_HIGH - 7 - Math.min(level, 4) * DOT})`,
        "data-row": row,
        class: `opd-dot-mark${solid ? " opd-solid" : ""}${row === selected ? " opd-on" : ""}`,
      });
      if (told) mark.appendChild(shape("title")).textContent = told;
      nodes.push(mark);
    }
    for (const { from, to, hidden } of crowded(stacks)) {
      const x = DOTS_EDGE + ((from + to) / 2) * DOT;
      const lined = move && Math.abs(x - toX(limit)) < 16; // the line would strike through it
      const more = shape("text", {
        x: lined ? toX(limit) + 4 : x,
        y: DOTS_HIGH - 6 - 5 * DOT,
        class: "opd-dots-more",
        "text-anchor": lined ? "start" : "middle",
      });
      more.textContent = `+${hidden}`;
      nodes.push(more);
    }
    put(svg, { width, height: DOTS_HIGH + 16 }).replaceChildren(...nodes, ...ticks());
    handle.style.left = `${toX(limit)}px`;
    put(handle, {
      "aria-valuemin": 0,
      "aria-valuemax": top.toPrecision(3),
      "aria-valuenow": limit,
      "aria-valuetext": number(limit),
      "data-value": `${sign} ${number(limit)}`,
    });
  };
  svg.addEventListener(
    "click",
    (event) => event.target.dataset.row !== undefined && choose(Number(event.target.dataset.row)),
  );
  handle.addEventListener(
    "pointerdown",
    (event) => (
      (held = true),
      handle.setPointerCapture(event.pointerId),
      event.preventDefault(),
      handle.focus()
    ),
  );
  handle.addEventListener(
    "pointermove",
    (event) => held && move(ofX(event.clientX - node.getBoundingClientRect().left)),
  );
  handle.addEventListener("pointerup", () => (held = false));
  handle.addEventListener("keydown", (event) => {
    const way = {
      ArrowRight: 1,
      ArrowUp: 1,
      ArrowLeft: -1,
      ArrowDown: -1,
      PageUp: 10,
      PageDown: -10,
    }[event.key];
    if (way === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    move(clamp(Number(handle.getAttribute("aria-valuenow")) + (way * top) / 100, 0, top));
  });
  return { node, draw, width: () => width };
};

// ‹ and › that go through things in an order; `step(way)` is told.
export const walkButtons = (what, step) => {
  const node = put(make("div", "opd-buttons opd-steps"), {
    role: "group",
    "aria-label": `Go through the ${what}s`,
  });
  for (const [words, way, label] of [
    ["‹", -1, `Previous ${what}`],
    ["›", 1, `Next ${what}`],
  ]) {
    const button = put(make("button", "opd-button", words), {
      type: "button",
      "aria-label": label,
    });
    button.addEventListener("click", () => step(way));
    node.append(button);
  }
  return node;
};

const TALL_STRIP = 400; // tokens from which a strip scrolls in its own box

// Scrolls a strip, not the page, to a row of its.
const keepInSight = (strip, row) => {
  const token = strip.nodes[row - strip.first]?.getClientRects()[0];
  const frame = strip.node.getBoundingClientRect();
  if (token && (token.top < frame.top + 20 || token.bottom > frame.bottom - 20))
    strip.node.scrollTop += token.top - frame.top - frame.height / 3;
};

// A place for the strip of whichever completion a row lies in: { node, open(row), all() }. Each strip is made once, when it is
// first looked at, by `fill(strip, whole)`.
export const stripPlace = ({ text, state, fill }) => {
  const node = make("div", "opd-place");
  const prompt = put(make("div", "opd-prompt"), { dir: "auto" });
  const holder = make("div", "opd-place-strip");
  const strips = new Map();
  let shown = null;
  node.append(prompt, holder);
  const open = (row) => {
    const whole = text.texts.find(({ first, size }) => row >= first && row < first + size);
    if (!whole) return null;
    if (!strips.has(whole.first)) {
      strips.set(
        whole.first,
        tokenStrip({ text, first: whole.first, size: whole.size, finish: whole.finish, state }),
      );
      fill(strips.get(whole.first), whole);
      strips.get(whole.first).node.classList.toggle("opd-tall", whole.size > TALL_STRIP);
    }
    if (shown !== whole) {
      shown = whole;
      prompt.textContent = whole.prompt;
      holder.replaceChildren(strips.get(whole.first).node);
    }
    if (whole.size > TALL_STRIP) keepInSight(strips.get(whole.first), row);
    return { whole, strip: strips.get(whole.first) };
  };
  return { node, open, all: () => [...strips] };
};
