// What all views draw with: nodes, numbers, colours, legend. Foreign text enters through textContent and setAttribute only.

/** @import { Channel, Draw, Glyph, Group, Numbers, Payloads, Scale, Text, Words } from "./types.js" */

/** @type {Record<string, Draw<any>>} */
export const views = {};

/**
 * Register a view under the name that Python knows it by. A view that `Payloads` does not list reads
 * its data unchecked.
 * @template {string} Name
 * @param {Name} name
 * @param {Draw<Name extends keyof Payloads ? Payloads[Name] : any>} draw
 */
export const define = (name, draw) => {
  views[name] = draw;
};

// ── Nodes ────────────────────────────────────────────────────────────────────────────────────────

/**
 * @template {keyof HTMLElementTagNameMap} Tag
 * @param {Tag} tag
 * @param {string} [look] class names
 * @param {string} [text]
 */
export const make = (tag, look = "", text = "") => {
  const node = document.createElement(tag);
  if (look) node.className = look;
  if (text) node.textContent = text;
  return node;
};

/**
 * Set attributes; values are written as text.
 * @template {Element} Target
 * @param {Target} node
 * @param {Record<string, unknown>} attributes
 */
export const put = (node, attributes) => {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, String(value));
  return node;
};

/**
 * @template {keyof SVGElementTagNameMap} Tag
 * @param {Tag} tag
 * @param {Record<string, unknown>} [attributes]
 */
export const shape = (tag, attributes = {}) =>
  put(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes);

/**
 * Text in a picture.
 * @param {string} words
 * @param {Record<string, unknown>} attributes
 */
export const svgText = (words, attributes) => {
  const node = shape("text", attributes);
  node.textContent = words;
  return node;
};

/** @param {string} look @param {string} words */
export const makeButton = (look, words = "") =>
  put(make("button", look ? `opd-button ${look}` : "opd-button", words), { type: "button" });

/** @param {...(Node | string)} children */
export const makeBar = (...children) => {
  const node = make("div", "opd-bar");
  node.append(...children);
  return node;
};

// A region that a screen reader speaks when it changes.
export const liveRegion = () => put(make("div", "opd-live"), { "aria-live": "polite" });

/** @param {string} prompt */
export const promptBox = (prompt) => put(make("div", "opd-prompt", prompt), { dir: "auto" });

/** @param {{ title: string }} data */
export const titleOf = ({ title }) => (title ? [make("div", "opd-title", title)] : []);

let made = 0;
export const unique = () => {
  made += 1;
  return `opd-${Date.now().toString(36)}-${Math.floor(1e6 * Math.random()).toString(36)}-${made}`;
};

// ── Events ───────────────────────────────────────────────────────────────────────────────────────

/**
 * Return the node around the event's target that matches the selector.
 * @param {Event} event
 * @param {string} selector
 * @returns {HTMLElement | null}
 */
export const closest = ({ target }, selector) =>
  target instanceof Element ? target.closest(selector) : null;

/**
 * Return the row that the event's target carries in its attribute `data-row`; -1 for none.
 * @param {Event} event
 */
export const rowOfEvent = (event) => Number(closest(event, "[data-row]")?.dataset.row ?? -1);

/**
 * Keys pressed with these belong to the browser.
 * @param {KeyboardEvent} event
 */
export const isModified = (event) => event.ctrlKey || event.metaKey || event.altKey;

/**
 * Call `redraw` when a node has another width than the one last drawn; returns what ends this.
 * @param {Element} node
 * @param {() => number} drawnWidth
 * @param {() => void} redraw
 */
export const watchWidth = (node, drawnWidth, redraw) => {
  const watch = new ResizeObserver(() => {
    if (node.clientWidth && Math.abs(node.clientWidth - drawnWidth()) > 1) redraw();
  });
  watch.observe(node);
  return () => watch.disconnect();
};

// ── Numbers: three digits, a real minus ──────────────────────────────────────────────────────────

/** @param {number} value @param {number} low @param {number} high */
export const clamp = (value, low, high) => Math.max(low, Math.min(high, value));

/** @param {Iterable<number>} values */
export const sum = (values) => {
  let total = 0;
  for (const value of values) total += value;
  return total;
};

/** @param {number} value @param {boolean} [signed] */
export const number = (value, signed = false) => {
  if (Number.isNaN(value)) return "–";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  if (value && Math.abs(value) < 0.0005) return value > 0 ? "<0.001" : ">−0.001";
  const text = Math.abs(value) < 1e15 ? String(Number(value.toPrecision(3))) : value.toPrecision(3);
  return (signed && value > 0 ? "+" : "") + text.replace("-", "−");
};

/** @param {number} share */
export const percent = (share) => {
  if (share === 0 || share === 1) return `${100 * share} %`;
  if (share > 0.9995) return ">99.9 %";
  if (share < 0.0001) return "<0.01 %";
  return `${(100 * share).toFixed(share < 0.01 ? 2 : 1)} %`;
};

// An arrow that repeats the sign, so that colour never stands alone.
/** @param {number} value */
export const arrowOf = (value) => {
  if (value > 0) return " ▲";
  return value < 0 ? " ▼" : "";
};

// ── Channels ─────────────────────────────────────────────────────────────────────────────────────

// A channel's value in words: the name of a category, or the number with its unit.
/** @param {number} value @param {Scale} channel */
const nameOf = (value, channel) => channel.names?.[value] ?? "–";

/** @param {Scale} channel */
export const isNamed = (channel) => Boolean(channel.names?.length);

/** @param {number} value @param {Scale} channel */
export const figureOf = (value, channel) =>
  isNamed(channel) ? nameOf(value, channel) : number(value, twoSided(channel));

/** @param {number} value @param {Scale & { unit: string }} channel */
export const measure = (value, channel) =>
  isNamed(channel) || !channel.unit
    ? figureOf(value, channel)
    : `${figureOf(value, channel)} ${channel.unit}`;

/**
 * The values of a channel that are numbers, summed.
 * @param {Iterable<number>} values
 */
export const sumOfNumbers = (values) => sum([...values].filter((value) => !Number.isNaN(value)));

// ── Colours: a side (whose hue) and a weight from 0 to 1, the square root of the size, so that middling values show ──

/** @type {Record<string, [negative: string, positive: string]>} */
const SIDES = { ratio: ["student", "teacher"], signed: ["minus", "amount"] };

/** @param {Scale} channel */
export const twoSided = (channel) => channel.kind in SIDES;

/** @param {number} value @param {Scale} channel */
export const sideOf = (value, channel) =>
  (SIDES[channel.kind] ?? ["amount", "amount"])[value > 0 ? 1 : 0];

/** @param {number} value @param {Scale} channel */
export const weightOf = (value, channel) => {
  if (Number.isNaN(value) || (isNamed(channel) && value < 0)) return 0;
  if (channel.kind === "category") return 1;
  const share = Math.abs(value) / channel.limit;
  return Math.min(1, channel.kind === "ordinal" ? share : Math.sqrt(share));
};

// 16 steps per side as classes: a browser recolours 10,000 nodes faster by class than by style.
const STEPS = 16;
const CATEGORY_COLOURS = 8;

/** @param {number} value @param {Scale} channel */
export const tintOf = (value, channel) => {
  if (channel.kind === "category") {
    const hue = channel.hues?.[value] ? ` opd-k-${channel.hues[value]}` : "";
    return value >= 0 ? `opd-k opd-k${value % CATEGORY_COLOURS}${hue}` : "";
  }
  const step = Math.round(STEPS * weightOf(value, channel));
  return step ? `opd-${sideOf(value, channel)} opd-w${step}` : "";
};

// The same colours for canvas, as [red, green, blue].
/** @type {Record<string, number[]>} */
export const HUES = {
  teacher: [0, 114, 178],
  student: [213, 94, 0],
  amount: [138, 111, 192],
  minus: [128, 128, 128],
};

export const KIND_HUES = [
  [0, 158, 115],
  [204, 121, 167],
  [176, 160, 0],
  [110, 125, 150],
  [150, 90, 60],
  [120, 180, 60],
  [220, 80, 90],
  [60, 190, 200],
];

/** @param {number} value @param {Scale} channel */
export const hueOf = (value, channel) =>
  channel.kind === "category"
    ? (HUES[channel.hues?.[value] ?? ""] ?? KIND_HUES[value % CATEGORY_COLOURS] ?? HUES.minus)
    : HUES[sideOf(value, channel)];

/**
 * Return the categories of one token, each with label, mark and name.
 * @param {(Scale & { label: string, values: Numbers })[]} kinds
 * @param {number} at place of the token in their values
 */
export const kindsAt = (kinds, at) =>
  kinds
    .filter(({ values }) => values[at] >= 0)
    .map((channel) => {
      const value = channel.values[at];
      const mark = make("span", `opd-kind ${tintOf(value, channel)}`, channel.marks?.[value]);
      const item = make("span", "opd-item");
      item.append(make("span", "opd-soft", channel.label), " ", mark, " ", nameOf(value, channel));
      return item;
    });

/** @param {number[]} hue @param {number} [alpha] */
export const css = ([red, green, blue], alpha = 1) => `rgba(${red},${green},${blue},${alpha})`;

// ── Legend: the scale from least to most with unit, clip marks and a cursor at the value looked at ──

// The key of categories: letter and name of each.
/** @param {HTMLElement} legend @param {Channel} channel */
const drawKey = (legend, channel) => {
  legend.classList.add("opd-key");
  const items = (channel.names ?? []).map((name, i) => {
    const item = put(make("span", "opd-item"), { "data-kind": i });
    item.append(make("span", `opd-kind ${tintOf(i, channel)}`, channel.marks?.[i] ?? name));
    if (channel.marks?.[i] !== name) item.append(make("span", "", name));
    return item;
  });
  legend.replaceChildren(...items);
};

/** @param {Channel} channel */
const colourScale = (channel) => {
  const scale = make("span", "opd-scale");
  for (let i = twoSided(channel) ? -STEPS : 0; i <= STEPS; i++) {
    const value = Math.sign(i) * (i / STEPS) ** 2 * channel.limit;
    scale.append(make("span", `opd-cell ${tintOf(value, channel)}`));
  }
  scale.append(make("span", "opd-cursor"));
  return scale;
};

/** @param {Channel} channel */
const scaleTicks = (channel) => {
  const signed = twoSided(channel);
  const ticks = put(make("span", "opd-ticks"), { "data-signed": signed });
  /** @param {number} sign */
  const isClipped = (sign) => channel.values.some((value) => sign * value > channel.limit);
  const limit = number(channel.limit);
  if (signed) ticks.append(make("span", "", `${isClipped(-1) ? "≤" : ""}−${limit}`));
  ticks.append(make("span", "", "0"), make("span", "", `${isClipped(1) ? "≥" : ""}${limit}`));
  return ticks;
};

/** @param {HTMLElement} legend @param {Channel} channel */
export const drawLegend = (legend, channel) => {
  legend.classList.add("opd-legend");
  legend.title = channel.formula ? `${channel.label}: ${channel.formula}` : "";
  if (isNamed(channel)) {
    drawKey(legend, channel);
    return;
  }
  legend.classList.remove("opd-key");
  const unit = make("span", "opd-unit", channel.unit ? `${channel.unit}, √ scale` : "√ scale");
  unit.title = "The colour grows as the square root of the size, so that middling values show.";
  const less = make("span", "opd-less", channel.less);
  const more = make("span", "opd-more", channel.more);
  legend.replaceChildren(less, colourScale(channel), more, scaleTicks(channel), unit);
};

/** @param {HTMLElement} legend @param {Scale & Words} channel @param {number} value */
export const moveCursor = (legend, channel, value) => {
  if (isNamed(channel)) {
    for (const item of legend.querySelectorAll("[data-kind]")) {
      item.toggleAttribute("data-on", Number(item.getAttribute("data-kind")) === value);
    }
    return;
  }
  const cursor = legend.querySelector(".opd-cursor");
  if (!(cursor instanceof HTMLElement)) return;
  const size = Math.min(1, Math.sqrt(Math.abs(value) / channel.limit));
  const at = twoSided(channel) ? 0.5 + (Math.sign(value) * size) / 2 : size;
  cursor.hidden = Number.isNaN(at);
  cursor.style.left = `${100 * at}%`;
};

// ── Tokens ───────────────────────────────────────────────────────────────────────────────────────

/**
 * Return the name of a row's token, as lists show it.
 * @param {Text} text
 * @param {number} row
 */
export const wordAt = (text, row) => {
  const entry = text.index[row];
  return text.word[entry] ?? String(text.glyph[entry]).replaceAll(" ", "·");
};

/**
 * Return the completion that a row lies in.
 * @param {Text} text
 * @param {number} row
 */
export const completionAt = (text, row) =>
  text.texts.find(({ first, size }) => row >= first && row < first + size);

/**
 * Draw a glyph into a node; returns the part that takes the colour.
 * @param {Glyph} glyph
 * @param {HTMLElement} holder
 */
export const drawGlyph = (glyph, holder) => {
  const isPlain = typeof glyph === "string";
  const lead = isPlain ? (/^ */.exec(glyph)?.[0] ?? "") : glyph[0];
  const ink = make("span", !isPlain && glyph[2] ? "opd-ink opd-special" : "opd-ink");
  if (lead) holder.append(lead);
  if (isPlain) ink.append(glyph.slice(lead.length));
  for (const [seen, raw] of isPlain ? [] : glyph[1]) {
    ink.append(seen === raw ? raw : put(make("span", "opd-mark", raw), { "data-mark": seen }));
  }
  holder.append(ink);
  return ink;
};

/**
 * Return the groups of rows first … first + size, in order.
 * @param {Text} text
 * @returns {Group[]}
 */
export const groupsOf = (text, first = 0, size = text.index.length) => {
  const joined = new Map(
    text.joined.map(([row, count, glyph]) => [row, { first: row, size: count, glyph }]),
  );
  const groups = [];
  for (let row = first; row < first + size;) {
    const group = joined.get(row) ?? { first: row, size: 1, glyph: text.glyph[text.index[row]] };
    groups.push(group);
    row += group.size;
  }
  return groups;
};
