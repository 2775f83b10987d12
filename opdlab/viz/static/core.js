// What all views draw with: nodes, numbers, colours, legend. Foreign text enters through textContent and setAttribute only.

const views = {};

// Registers a view: `draw({ box, data, state })` fills the empty node `box`, and may return a function that undoes what is
// outside of it (observers, timers).
const define = (name, draw) => {
  views[name] = draw;
};

const make = (tag, look = "", text = "") => {
  const node = document.createElement(tag);
  if (look) node.className = look;
  if (text) node.textContent = text;
  return node;
};

const put = (node, attributes) => {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
};

const shape = (tag, attributes = {}) => put(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes);

let made = 0;
const unique = () => `opd-${Date.now().toString(36)}-${Math.floor(1e6 * Math.random()).toString(36)}-${made++}`;

const clamp = (value, low, high) => Math.max(low, Math.min(high, value));

// ── Numbers: three digits, a real minus ──────────────────────────────────────────────────────────────────────────

const number = (value, signed = false) => {
  if (Number.isNaN(value)) return "–";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  if (value && Math.abs(value) < 0.0005) return value > 0 ? "<0.001" : ">−0.001";
  const text = Math.abs(value) < 1e15 ? String(Number(value.toPrecision(3))) : value.toPrecision(3);
  return (signed && value > 0 ? "+" : "") + text.replace("-", "−");
};

const percent = (p) => {
  if (p === 0 || p === 1) return `${100 * p} %`;
  if (p > 0.9995) return ">99.9 %";
  if (p < 0.0001) return "<0.01 %";
  return `${(100 * p).toFixed(p < 0.01 ? 2 : 1)} %`;
};

const measure = (value, channel) => [number(value, twoSided(channel)), channel.unit].filter(Boolean).join(" ");

// ── Colours: a side (whose hue) and a weight from 0 to 1, the square root of the size, so that middling values show ──

const SIDES = { ratio: ["student", "teacher"], signed: ["minus", "amount"] };
const twoSided = (channel) => channel.kind in SIDES;
const sideOf = (value, channel) => (SIDES[channel.kind] ?? ["amount", "amount"])[value > 0 ? 1 : 0];
const weightOf = (value, channel) => (Number.isNaN(value) ? 0 : Math.min(1, Math.sqrt(Math.abs(value) / channel.limit)));

// 16 steps a side as classes: a browser recolours 10,000 nodes faster by class than by style.
const STEPS = 16;
const tintOf = (value, channel) => {
  const step = Math.round(STEPS * weightOf(value, channel));
  return step ? `opd-${sideOf(value, channel)} opd-w${step}` : "";
};

// The same colours for canvas, as [r, g, b, alpha].
const HUES = { teacher: [0, 114, 178], student: [213, 94, 0], amount: [138, 111, 192], minus: [128, 128, 128] };

// ── Legend: the scale from least to most with unit, clip marks and a cursor at the value looked at ────────────────

const drawLegend = (legend, channel) => {
  const scale = make("span", "opd-scale"), signed = twoSided(channel), least = signed ? -STEPS : 0;
  for (let i = least; i <= STEPS; i++) {
    scale.append(make("span", `opd-cell ${tintOf(Math.sign(i) * (i / STEPS) ** 2 * channel.limit, channel)}`));
  }
  scale.append(make("span", "opd-cursor"));
  const ticks = put(make("span", "opd-ticks"), { "data-signed": signed });
  const clipped = (sign) => channel.values.some((v) => sign * v > channel.limit);
  if (signed) ticks.append(make("span", "", `${clipped(-1) ? "≤" : ""}−${number(channel.limit)}`));
  ticks.append(make("span", "", "0"), make("span", "", `${clipped(1) ? "≥" : ""}${number(channel.limit)}`));
  const unit = make("span", "opd-unit", [channel.unit, "√ scale"].filter(Boolean).join(", "));
  unit.title = "The colour grows as the square root of the size, so that middling values show.";
  legend.classList.add("opd-legend");
  legend.replaceChildren(make("span", "opd-less", channel.less), scale, make("span", "opd-more", channel.more), ticks, unit);
};

const moveCursor = (legend, channel, value) => {
  const cursor = legend.querySelector(".opd-cursor"), size = Math.min(1, Math.sqrt(Math.abs(value) / channel.limit));
  const at = twoSided(channel) ? 0.5 + (Math.sign(value) * size) / 2 : size;
  cursor.hidden = Number.isNaN(at);
  cursor.style.left = `${100 * at}%`;
};

// ── Tokens ───────────────────────────────────────────────────────────────────────────────────────────────────────

// The name of vocabulary entry v, as lists show it; of a row: `wordOf(text, text.index[row])`.
const wordOf = (text, v) => text.word[v] ?? text.glyph[v].replaceAll(" ", "·");

// Draws a glyph (a string, or [lead, [[seen, raw], …], special]) into a node and returns the part that takes the colour.
const drawGlyph = (glyph, holder) => {
  const [lead, parts, special] = typeof glyph === "string" ? [glyph.match(/^ */)[0], null, 0] : glyph;
  const ink = make("span", special ? "opd-ink opd-special" : "opd-ink");
  if (lead) holder.append(lead);
  if (parts === null) ink.append(glyph.slice(lead.length));
  for (const [seen, raw] of parts ?? []) ink.append(seen === raw ? raw : put(make("span", "opd-mark", raw), { "data-mark": seen }));
  holder.append(ink);
  return ink;
};

// The groups of rows first … first + size: { first, size, glyph }, in order.
const groupsOf = (text, first = 0, size = text.index.length) => {
  const joined = new Map(text.joined.map(([at, count, glyph]) => [at, { first: at, size: count, glyph }])), out = [];
  for (let i = first; i < first + size; i += out.at(-1).size) {
    out.push(joined.get(i) ?? { first: i, size: 1, glyph: text.glyph[text.index[i]] });
  }
  return out;
};
