// What all views draw with: nodes, numbers, colours, legend. Foreign text enters through textContent and setAttribute only.

export const views = {};

// Registers a view: `draw({ box, data, state })` fills the empty node `box`, and may return a function that undoes what is
// outside of it (observers, timers).
export const define = (name, draw) => {
  views[name] = draw;
};

export const make = (tag, look = "", text = "") => {
  const node = document.createElement(tag);
  if (look) node.className = look;
  if (text) node.textContent = text;
  return node;
};

export const put = (node, attributes) => {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
};

export const shape = (tag, attributes = {}) =>
  put(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes);

let made = 0;
export const unique = () =>
  `opd-${Date.now().toString(36)}-${Math.floor(1e6 * Math.random()).toString(36)}-${made++}`;

export const clamp = (value, low, high) => Math.max(low, Math.min(high, value));

// ── Numbers: three digits, a real minus ──────────────────────────────────────────────────────────────────────────

export const number = (value, signed = false) => {
  if (Number.isNaN(value)) return "–";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  if (value && Math.abs(value) < 0.0005) return value > 0 ? "<0.001" : ">−0.001";
  const text = Math.abs(value) < 1e15 ? String(Number(value.toPrecision(3))) : value.toPrecision(3);
  return (signed && value > 0 ? "+" : "") + text.replace("-", "−");
};

export const percent = (p) => {
  if (p === 0 || p === 1) return `${100 * p} %`;
  if (p > 0.9995) return ">99.9 %";
  if (p < 0.0001) return "<0.01 %";
  return `${(100 * p).toFixed(p < 0.01 ? 2 : 1)} %`;
};

// A value of a channel in words: the name of a kind, or the number with its unit.
const nameOf = (value, channel) => channel.names?.[value] ?? "–";
export const isNamed = (channel) => Boolean(channel.names?.length);
export const figureOf = (value, channel) =>
  isNamed(channel) ? nameOf(value, channel) : number(value, twoSided(channel));
export const measure = (value, channel) =>
  isNamed(channel)
    ? nameOf(value, channel)
    : [number(value, twoSided(channel)), channel.unit].filter(Boolean).join(" ");

// ── Colours: a side (whose hue) and a weight from 0 to 1, the square root of the size, so that middling values show ──

const SIDES = { ratio: ["student", "teacher"], signed: ["minus", "amount"] };
export const twoSided = (channel) => channel.kind in SIDES;
export const sideOf = (value, channel) =>
  (SIDES[channel.kind] ?? ["amount", "amount"])[value > 0 ? 1 : 0];
export const weightOf = (value, channel) => {
  if (Number.isNaN(value) || (isNamed(channel) && value < 0)) return 0;
  const share = Math.abs(value) / channel.limit;
  return channel.kind === "category"
    ? 1
    : Math.min(1, channel.kind === "ordinal" ? share : Math.sqrt(share));
};

// 16 steps a side as classes: a browser recolours 10,000 nodes faster by class than by style.
const STEPS = 16;
const KINDS_SHOWN = 8; // colours of kinds
export const tintOf = (value, channel) => {
  if (channel.kind === "category") {
    const hue = channel.hues?.[value] ? ` opd-k-${channel.hues[value]}` : "";
    return value >= 0 ? `opd-k opd-k${value % KINDS_SHOWN}${hue}` : "";
  }
  const step = Math.round(STEPS * weightOf(value, channel));
  return step ? `opd-${sideOf(value, channel)} opd-w${step}` : "";
};

// The same colours for canvas, as [r, g, b].
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
export const hueOf = (value, channel) =>
  channel.kind === "category"
    ? (HUES[channel.hues?.[value]] ?? KIND_HUES[value % KINDS_SHOWN] ?? HUES.minus)
    : HUES[sideOf(value, channel)];
// The kinds of one token, each with label, mark and name. `kinds`: channels of kind "category"; `at`: its place in their values.
export const kindsAt = (kinds, at) =>
  kinds
    .filter(({ values }) => values[at] >= 0)
    .map((channel) => {
      const value = channel.values[at];
      const item = make("span", "opd-item");
      item.append(make("span", "opd-soft", channel.label), " ");
      item.append(make("span", `opd-kind ${tintOf(value, channel)}`, channel.marks[value]), " ");
      item.append(nameOf(value, channel));
      return item;
    });
export const css = ([r, g, b], alpha = 1) => `rgba(${r},${g},${b},${alpha})`;

// ── Legend: the scale from least to most with unit, clip marks and a cursor at the value looked at ────────────────

// The key of kinds: letter and name of each.
const drawKey = (legend, channel) => {
  legend.classList.add("opd-key");
  legend.replaceChildren(
    ...channel.names.map((name, i) => {
      const item = put(make("span", "opd-item"), { "data-kind": i });
      item.append(make("span", `opd-kind ${tintOf(i, channel)}`, channel.marks?.[i] ?? name));
      if (channel.marks?.[i] !== name) item.append(make("span", "", name));
      return item;
    }),
  );
};

export const drawLegend = (legend, channel) => {
  legend.classList.add("opd-legend");
  legend.title = channel.formula ? `${channel.label}: ${channel.formula}` : "";
  if (isNamed(channel)) return drawKey(legend, channel);
  legend.classList.remove("opd-key");
  const scale = make("span", "opd-scale");
  const signed = twoSided(channel);
  const least = signed ? -STEPS : 0;
  for (let i = least; i <= STEPS; i++) {
    scale.append(
      make("span", `opd-cell ${tintOf(Math.sign(i) * (i / STEPS) ** 2 * channel.limit, channel)}`),
    );
  }
  scale.append(make("span", "opd-cursor"));
  const ticks = put(make("span", "opd-ticks"), { "data-signed": signed });
  const clipped = (sign) => channel.values.some((v) => sign * v > channel.limit);
  if (signed) ticks.append(make("span", "", `${clipped(-1) ? "≤" : ""}−${number(channel.limit)}`));
  ticks.append(
    make("span", "", "0"),
    make("span", "", `${clipped(1) ? "≥" : ""}${number(channel.limit)}`),
  );
  const unit = make("span", "opd-unit", [channel.unit, "√ scale"].filter(Boolean).join(", "));
  unit.title = "The colour grows as the square root of the size, so that middling values show.";
  legend.replaceChildren(
    make("span", "opd-less", channel.less),
    scale,
    make("span", "opd-more", channel.more),
    ticks,
    unit,
  );
};

export const moveCursor = (legend, channel, value) => {
  if (isNamed(channel)) {
    for (const item of legend.children)
      item.toggleAttribute("data-on", Number(item.dataset.kind) === value);
    return;
  }
  const cursor = legend.querySelector(".opd-cursor");
  const size = Math.min(1, Math.sqrt(Math.abs(value) / channel.limit));
  const at = twoSided(channel) ? 0.5 + (Math.sign(value) * size) / 2 : size;
  cursor.hidden = Number.isNaN(at);
  cursor.style.left = `${100 * at}%`;
};

// ── Tokens ───────────────────────────────────────────────────────────────────────────────────────────────────────

// The name of vocabulary entry v, as lists show it; of a row: `wordOf(text, text.index[row])`.
export const wordOf = (text, v) => text.word[v] ?? text.glyph[v].replaceAll(" ", "·");

// Draws a glyph (a string, or [lead, [[seen, raw], …], special]) into a node and returns the part that takes the colour.
export const drawGlyph = (glyph, holder) => {
  const [lead, parts, special] =
    typeof glyph === "string" ? [glyph.match(/^ */)[0], null, 0] : glyph;
  const ink = make("span", special ? "opd-ink opd-special" : "opd-ink");
  if (lead) holder.append(lead);
  if (parts === null) ink.append(glyph.slice(lead.length));
  for (const [seen, raw] of parts ?? [])
    ink.append(seen === raw ? raw : put(make("span", "opd-mark", raw), { "data-mark": seen }));
  holder.append(ink);
  return ink;
};

// The groups of rows first … first + size: { first, size, glyph }, in order.
export const groupsOf = (text, first = 0, size = text.index.length) => {
  const joined = new Map(
    text.joined.map(([at, count, glyph]) => [at, { first: at, size: count, glyph }]),
  );
  const out = [];
  for (let i = first; i < first + size; i += out.at(-1).size) {
    out.push(joined.get(i) ?? { first: i, size: 1, glyph: text.glyph[text.index[i]] });
  }
  return out;
};
