// A lens: the tokens of one completion coloured by a channel and, under them, the duel of the policies at one token.
// Tokens are data: they enter the page through textContent and setAttribute, never as markup.

let count = 0;

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

const signed = (channel) => channel.kind !== "amount";
const measure = (value, channel) => [number(value, signed(channel)), channel.unit].filter(Boolean).join(" ");

// Colour: a side (whose hue) and a weight from 0 to 1, the square root of the size, so that middling values show.
const tint = (node, value, channel) => {
  const [minus, plus] = { ratio: ["student", "teacher"], signed: ["minus", "amount"] }[channel.kind] ?? ["amount", "amount"];
  const weight = Number.isNaN(value) ? 0 : Math.min(1, Math.sqrt(Math.abs(value) / channel.limit));
  node.dataset.side = value > 0 ? plus : minus;
  node.style.setProperty("--w", weight.toFixed(3));
};

const strongest = (values) => values.reduce((best, v) => (Math.abs(v) > Math.abs(best) || Number.isNaN(best) ? v : best), NaN);

// ── The strip ────────────────────────────────────────────────────────────────────────────────────────────────────

const glyph = (group, holder) => {
  const [lead, parts, , special] = group;
  if (lead) holder.append(lead);
  const ink = make("span", special ? "opd-ink opd-special" : "opd-ink");
  for (const [seen, raw] of parts) {
    if (seen === raw) ink.append(raw);
    else ink.append(put(make("span", "opd-mark", raw), { "data-mark": seen }));
  }
  holder.append(ink);
  return ink;
};

// One option a token. Several tokens that are one glyph (bytes of an emoji) lie as cells under it.
const drawStrip = (data, id) => {
  const strip = put(make("div", "opd-strip"), { role: "listbox", tabindex: "0", dir: "auto", "aria-label": "Tokens of the completion" });
  strip.dataset.finish = data.finish;
  const tokens = [], glyphs = [];
  const option = (node) => {
    const i = tokens.push(node) - 1;
    put(node, { role: "option", id: `${id}-${i}`, "data-i": i, "aria-selected": "false" });
    put(node, { "aria-label": `position ${i}, ${data.words[i]}` });
  };
  for (const group of data.groups) {
    const holder = make("span", "opd-token"), first = tokens.length, ink = glyph(group, holder);
    if (group[2] === 1) option(holder);
    else {
      const cells = make("span", "opd-cells");
      for (let k = 0; k < group[2]; k++) option(cells.appendChild(make("span", "opd-byte")));
      ink.append(cells);
    }
    glyphs.push({ ink, first, size: group[2] });
    strip.append(holder);
  }
  if (!tokens.length) strip.append(make("span", "opd-soft", "(no tokens)"));
  return { strip, tokens, glyphs };
};

const paint = (view, channel) => {
  for (const { ink, first, size } of view.glyphs) tint(ink, strongest(channel.values.slice(first, first + size)), channel);
  view.tokens.forEach((node, i) => {
    if (node.classList.contains("opd-byte")) tint(node, channel.values[i], channel);
    node.classList.toggle("opd-peak", channel.peaks.includes(i));
  });
};

// ── Channels and legend ──────────────────────────────────────────────────────────────────────────────────────────

const drawButtons = (data, choose) => {
  const bar = put(make("div", "opd-buttons"), { role: "group", "aria-label": "What the colour shows" });
  data.channels.forEach((channel, i) => {
    const button = put(make("button", "opd-button", channel.label), { type: "button", "data-channel": channel.key });
    button.addEventListener("click", () => choose(i));
    bar.append(button);
  });
  return bar;
};

const STEPS = 12;
const drawLegend = (legend, channel) => {
  const scale = make("span", "opd-scale"), least = signed(channel) ? -STEPS : 0;
  for (let i = least; i <= STEPS; i++) tint(scale.appendChild(make("span", "opd-cell")), (i / STEPS) * channel.limit, channel);
  scale.append(make("span", "opd-cursor"));
  const ticks = put(make("span", "opd-ticks"), { "data-signed": signed(channel) });
  const clipped = (sign) => channel.values.some((v) => sign * v > channel.limit);
  if (signed(channel)) ticks.append(make("span", "", `${clipped(-1) ? "≤" : ""}−${number(channel.limit)}`));
  ticks.append(make("span", "", "0"), make("span", "", `${clipped(1) ? "≥" : ""}${number(channel.limit)}`));
  const unit = make("span", "opd-unit", [channel.unit, "√ scale"].filter(Boolean).join(", "));
  unit.title = "The colour grows as the square root of the size, so that middling values show.";
  legend.replaceChildren(make("span", "opd-less", channel.less), scale, make("span", "opd-more", channel.more), ticks, unit);
};

const moveCursor = (legend, channel, value) => {
  const cursor = legend.querySelector(".opd-cursor"), low = signed(channel) ? -1 : 0;
  const at = Math.max(low, Math.min(1, value / channel.limit));
  cursor.hidden = Number.isNaN(at);
  cursor.style.left = `${(100 * (at - low)) / (1 - low)}%`;
};

// ── The duel ─────────────────────────────────────────────────────────────────────────────────────────────────────

const bar = (owner) => {
  const cell = make("span", `opd-track opd-of-${owner}`);
  cell.append(make("span", "opd-fill"));
  return cell;
};

const duelRow = () => {
  const row = make("div", "opd-row");
  row.append(bar("student"), make("span", "opd-p"), make("span", "opd-word"), make("span", "opd-p"), bar("teacher"));
  return row;
};

const fill = (row, word, left, right) => {
  const [barL, pL, name, pR, barR] = row.children;
  barL.firstChild.style.width = `${100 * left}%`;
  pL.textContent = percent(left);
  name.textContent = word;
  pR.textContent = right === null ? "" : percent(right);
  barR.firstChild.style.width = `${100 * (right ?? 0)}%`;
};

const drawPanel = (data) => {
  const panel = make("div", "opd-panel"), head = make("div", "opd-row opd-head"), rows = make("div", "opd-rows");
  head.append(make("span", "opd-side opd-of-student"), make("span", "opd-now"), make("span", "opd-side opd-of-teacher"));
  const most = data.duel ? Math.max(...data.duel.rows.map((row) => row.length)) + 1 : 0;
  for (let i = 0; i < most; i++) rows.append(duelRow());
  const facts = make("div", "opd-facts");
  for (const channel of data.channels) {
    const fact = put(make("span", "opd-fact"), { "data-channel": channel.key });
    fact.append(make("span", "opd-name", channel.label), make("span", "opd-value"));
    facts.append(fact);
  }
  panel.append(head, rows, facts);
  if (!data.policies[1]) panel.classList.add("opd-alone");
  return panel;
};

const sideText = (data, policy, i) => {
  if (!policy) return "";
  const entropy = data.channels.find((c) => c.key === `${policy}_entropy`), rank = data.duel?.rank[policy];
  const facts = [entropy && `entropy ${number(entropy.values[i])}`, rank && `rank ${rank[i]}`].filter(Boolean);
  return facts.join(" · ");
};

const showDuel = (rows, duel, i, rival) => {
  const ids = duel.rows[i], [student, teacher] = ["student", rival].map((name) => duel.p[name]?.[i]);
  [...rows.children].forEach((row, k) => {
    const id = ids[k], last = k === ids.length;
    row.classList.toggle("opd-empty", k > ids.length);
    row.classList.toggle("opd-other", last);
    row.toggleAttribute("data-sampled", k < ids.length && id === duel.sampled[i]);
    if (k < ids.length) fill(row, duel.words[id], student?.[k] ?? 0, teacher?.[k] ?? null);
    else if (last) fill(row, "all others", duel.other.student?.[i] ?? 0, duel.other[rival]?.[i] ?? null);
    else fill(row, "", 0, null);
  });
};

const show = (view, data, channel, rival, i) => {
  const [left, now, right] = view.panel.firstChild.children;
  for (const [node, policy] of [[left, "student"], [right, rival]]) {
    node.replaceChildren(make("b", "", policy ?? ""), make("span", "opd-soft", sideText(data, policy, i)));
  }
  now.replaceChildren(make("span", "opd-word", data.words[i]), make("span", "opd-soft", `sampled at position ${i}`));
  now.setAttribute("title", `id ${data.ids[i]}`);
  if (data.duel) showDuel(view.panel.children[1], { ...data.duel, sampled: data.ids }, i, rival);
  [...view.panel.lastChild.children].forEach((fact, k) => {
    const c = data.channels[k], arrow = c.kind === "ratio" ? (c.values[i] > 0 ? " ▲" : c.values[i] < 0 ? " ▼" : "") : "";
    fact.lastChild.textContent = number(c.values[i], signed(c)) + arrow;
    fact.toggleAttribute("data-on", c === channel);
  });
  moveCursor(view.legend, channel, channel.values[i]);
};

const spoken = (data, channel, i) => {
  const id = data.duel?.rows[i][0], best = data.duel ? `, likeliest ${data.duel.words[id]}` : "";
  return `position ${i}, ${data.words[i]}, ${channel.label} ${measure(channel.values[i], channel)}${best}`;
};

// ── Moving about ─────────────────────────────────────────────────────────────────────────────────────────────────

// The token on the next line (down = 1) or the one before (-1) that lies nearest below or above.
const acrossLines = (tokens, from, down) => {
  const box = (i) => tokens[i].getClientRects()[0] ?? tokens[i].getBoundingClientRect();
  const here = box(from), middle = (b) => b.left + b.width / 2;
  let best = from, line = null, gap = Infinity;
  for (let i = from + down; tokens[i]; i += down) {
    const b = box(i);
    if (Math.abs(b.bottom - here.bottom) < 8) continue;
    line ??= b.bottom;
    if (Math.abs(b.bottom - line) >= 8) break;
    if (Math.abs(middle(b) - middle(here)) < gap) [best, gap] = [i, Math.abs(middle(b) - middle(here))];
  }
  return best;
};

const nextPeak = (peaks, from, way) => {
  const sorted = [...peaks].sort((a, b) => way * (a - b));
  return sorted.find((i) => way * (i - from) > 0) ?? sorted[0] ?? from;
};

const target = (key, view, channel, from) => {
  const last = view.tokens.length - 1;
  const moves = {
    ArrowRight: () => Math.min(last, from + 1), ArrowLeft: () => Math.max(0, from - 1), Home: () => 0, End: () => last,
    ArrowDown: () => acrossLines(view.tokens, from, 1), ArrowUp: () => acrossLines(view.tokens, from, -1),
    n: () => nextPeak(channel.peaks, from, 1), p: () => nextPeak(channel.peaks, from, -1),
  };
  return moves[key]?.();
};

const draw = (data, id, choose) => {
  const view = { ...drawStrip(data, id), panel: drawPanel(data), legend: make("div", "opd-legend") };
  const prompt = put(make("div", "opd-prompt", data.prompt), { dir: "auto" }), chrome = make("div", "opd-bar");
  view.buttons = drawButtons(data, choose);
  view.live = put(make("div", "opd-live"), { "aria-live": "polite" });
  chrome.append(view.buttons, view.legend);
  view.nodes = [...(data.title ? [make("div", "opd-title", data.title)] : []), prompt, chrome, view.strip, view.panel, view.live];
  return view;
};

// Draws `model.get("data")` into `el` and returns what undoes it.
export function mount(model, el) {
  const data = model.get("data");
  for (const channel of data.channels) channel.values = channel.values.map(Number);
  let chosen = Math.max(0, data.channels.findIndex((c) => c.key === model.get("channel")));
  let rival = data.policies.find((name) => name !== "student"), at = data.channels[chosen].peaks[0] ?? 0;
  const here = () => data.channels[chosen];
  const look = (i) => view.tokens.length && show(view, data, here(), rival, i);
  const choose = (i) => {
    chosen = i;
    rival = here().against || rival;
    [...view.buttons.children].forEach((button, k) => button.setAttribute("aria-pressed", k === i));
    paint(view, here());
    drawLegend(view.legend, here());
    look(at);
  };
  const move = (i) => {
    view.tokens[at]?.setAttribute("aria-selected", "false");
    at = i;
    view.tokens[at].setAttribute("aria-selected", "true");
    view.strip.setAttribute("aria-activedescendant", view.tokens[at].id);
    look(at);
  };
  const view = draw(data, `opd-${Date.now().toString(36)}-${count++}`, choose);
  const tokenAt = (event) => event.target.closest?.("[data-i]");
  const listen = {
    pointerover: (event) => tokenAt(event) && look(Number(tokenAt(event).dataset.i)),
    pointerleave: () => look(at),
    click: (event) => tokenAt(event) && move(Number(tokenAt(event).dataset.i)),
    keydown: (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || !view.tokens.length) return;
      const i = target(event.key, view, here(), at), digit = Number(event.key) - 1;
      if (i === undefined && !data.channels[digit]) return;
      event.preventDefault();
      if (i === undefined) choose(digit);
      else move(i);
      view.live.textContent = spoken(data, here(), at);
    },
  };
  for (const [name, act] of Object.entries(listen)) view.strip.addEventListener(name, act);
  el.replaceChildren(...view.nodes);
  choose(chosen);
  if (view.tokens.length) move(at);
  return () => el.replaceChildren();
}

export default { render: ({ model, el }) => mount(model, el) };
