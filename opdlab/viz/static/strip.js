// The token strip: the text itself with one option a token, coloured by a channel, walked by keys, in step with `state`.
// A channel here is { key, label, unit, kind, limit, values, peaks, … } with one value a row, as `channels.described` makes it.

const BLOCK = 400; // glyphs after which a long text is cut into blocks that need no layout while they are out of sight
const LONG_TEXT = 2000;

const strongest = (values, from, to) => {
  let best = NaN;
  for (let i = from; i < to; i++) if (Number.isNaN(best) || Math.abs(values[i]) > Math.abs(best)) best = values[i];
  return best;
};

// Draws rows first … first + size of `text`. Several tokens that are one glyph (bytes of an emoji) lie as cells under it.
const drawTokens = (text, first, size, strip) => {
  const nodes = [], glyphs = [], option = put(make("span", "opd-token"), { role: "option", "aria-selected": "false" });
  const byte = put(make("span", "opd-byte"), { role: "option", "aria-selected": "false" }), long = size > LONG_TEXT;
  let block = strip, room = 0;
  for (const group of groupsOf(text, first, size)) {
    if (long && (room-- <= 0)) [block, room] = [strip.appendChild(put(make("div", "opd-block"), { role: "none" })), BLOCK];
    const single = group.size === 1, holder = single ? option.cloneNode() : make("span", "opd-token"), ink = drawGlyph(group.glyph, holder);
    const add = (node, row) => (nodes.push(node), node.setAttribute("data-i", row));
    if (single) {
      add(holder, group.first);
      if (typeof group.glyph !== "string") holder.setAttribute("aria-label", wordOf(text, text.index[group.first]));
    }
    if (!single) {
      const cells = ink.appendChild(make("span", "opd-cells"));
      for (let row = group.first; row < group.first + group.size; row++) {
        add(put(cells.appendChild(byte.cloneNode()), { "aria-label": wordOf(text, text.index[row]) }), row);
      }
    }
    glyphs.push({ ink, base: ink.className, first: group.first - first, size: group.size });
    block.append(holder);
    if (long && room < BLOCK / 2 && ink.textContent.endsWith("\n")) room = 0;
  }
  if (!size) strip.append(make("span", "opd-soft", "(no tokens)"));
  return { nodes, glyphs };
};

// The token on the next line (down = 1) or the one before (-1) that lies nearest below or above.
const acrossLines = (nodes, from, down) => {
  const box = (i) => nodes[i].getClientRects()[0] ?? nodes[i].getBoundingClientRect();
  const here = box(from), middle = (b) => b.left + b.width / 2;
  let best = from, line = null, gap = Infinity;
  for (let i = from + down; nodes[i]; i += down) {
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

// { node, paint(channel), channel() }. Clicks and keys set state.selected (rows of the data), pointing sets state.hovered;
// both, and state.brush, are marked here whoever set them. `keys(event)` may take what the strip does not: return true.
const tokenStrip = ({ text, first = 0, size = text.index.length, finish = "", label = "Tokens of the completion", state, keys }) => {
  const node = put(make("div", "opd-strip"), { role: "listbox", tabindex: "0", dir: "auto", "aria-label": label, "data-finish": finish });
  const { nodes, glyphs } = drawTokens(text, first, size, node), here = () => clamp(state.get("selected") - first, 0, size - 1);
  let channel = null, chosen = null, pointed = null, brushed = [];

  const paint = (next) => {
    channel = next;
    const peaks = new Set(channel.peaks);
    for (const g of glyphs) {
      g.ink.className = `${g.base} ${tintOf(strongest(channel.values, first + g.first, first + g.first + g.size), channel)}`;
      if (g.size > 1) for (let k = g.first; k < g.first + g.size; k++) nodes[k].className = `opd-byte ${tintOf(channel.values[first + k], channel)}`;
    }
    for (const old of node.querySelectorAll(".opd-peak")) old.classList.remove("opd-peak");
    for (const row of peaks) nodes[row - first]?.classList.add("opd-peak");
  };

  const select = (row) => {
    chosen?.setAttribute("aria-selected", "false");
    chosen = nodes[row - first] ?? null;
    if (!chosen) return node.removeAttribute("aria-activedescendant");
    chosen.id ||= unique();
    put(chosen, { "aria-selected": "true", "aria-label": `position ${row - first}, ${wordOf(text, text.index[row])}` });
    node.setAttribute("aria-activedescendant", chosen.id);
  };
  const point = (row) => {
    pointed?.classList.remove("opd-pointed");
    pointed = nodes[row - first] ?? null;
    pointed?.classList.add("opd-pointed");
  };
  const mark = ([from, to = from]) => {
    for (const old of brushed) old.classList.remove("opd-brushed");
    brushed = from === undefined ? [] : nodes.slice(Math.max(0, Math.min(from, to) - first), Math.max(from, to) - first + 1);
    for (const one of brushed) one.classList.add("opd-brushed");
  };
  const reveal = () => chosen?.scrollIntoView({ block: "nearest", behavior: "instant" });

  const moves = {
    ArrowRight: (i) => Math.min(size - 1, i + 1), ArrowLeft: (i) => Math.max(0, i - 1), Home: () => 0, End: () => size - 1,
    ArrowDown: (i) => acrossLines(nodes, i, 1), ArrowUp: (i) => acrossLines(nodes, i, -1),
    n: (i) => nextPeak(channel?.peaks ?? [], i + first, 1) - first, p: (i) => nextPeak(channel?.peaks ?? [], i + first, -1) - first,
  };
  const press = (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !size) return;
    const from = here(), to = moves[event.key]?.(from);
    if (to === undefined && event.key !== "Escape") return keys?.(event) && event.preventDefault();
    event.preventDefault();
    if (event.key === "Escape") return state.set("brush", []);
    if (event.shiftKey) state.set("brush", [state.get("brush")[0] ?? from + first, to + first]);
    state.set("selected", to + first);
    reveal();
  };
  const rowAt = (event) => event.target.closest?.("[data-i]")?.dataset.i;
  node.addEventListener("pointerover", (event) => rowAt(event) !== undefined && state.set("hovered", Number(rowAt(event))));
  node.addEventListener("pointerleave", () => state.set("hovered", -1));
  node.addEventListener("click", (event) => rowAt(event) !== undefined && state.set("selected", Number(rowAt(event))));
  node.addEventListener("keydown", press);
  for (const [name, act] of [["selected", select], ["hovered", point], ["brush", mark]]) {
    state.on(name, act);
    act(state.get(name));
  }
  return { node, paint, nodes, channel: () => channel };
};

// Buttons that choose a channel; `press(i)` marks the chosen one.
const channelButtons = (channels, choose) => {
  const node = put(make("div", "opd-buttons"), { role: "group", "aria-label": "What the colour shows" });
  channels.forEach((channel, i) => {
    const button = put(make("button", "opd-button", channel.label), { type: "button", "data-channel": channel.key });
    button.addEventListener("click", () => choose(i));
    node.append(button);
  });
  return { node, press: (i) => [...node.children].forEach((button, k) => button.setAttribute("aria-pressed", k === i)) };
};
