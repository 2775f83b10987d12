// The token strip: the text itself with one option a token, coloured by a channel, walked by keys, in step with `state`.
// A channel here is { key, label, unit, kind, limit, values, peaks, … } with one value a row, as `channels.described` makes it.

import { clamp, drawGlyph, groupsOf, isNamed, make, put, tintOf, unique, wordOf } from "./core.js";

const BLOCK = 400; // glyphs after which a long text is cut into blocks that need no layout while they are out of sight
const LONG_TEXT = 2000;

export const strongest = (values, from, to) => {
  let best = NaN;
  for (let i = from; i < to; i++)
    if (Number.isNaN(best) || Math.abs(values[i]) > Math.abs(best)) best = values[i];
  return best;
};

// What a glyph of rows from … to - 1 shows: of numbers the largest size, so that peaks survive; of kinds the first.
export const shownOf = (channel, from, to) =>
  isNamed(channel) ? channel.values[from] : strongest(channel.values, from, to);

// Draws rows first … first + size of `text`. Several tokens that are one glyph (bytes of an emoji) lie as cells under it.
const drawTokens = (text, first, size, strip) => {
  const nodes = [];
  const glyphs = [];
  const option = put(make("span", "opd-token"), { role: "option", "aria-selected": "false" });
  const byte = put(make("span", "opd-byte"), { role: "option", "aria-selected": "false" });
  const long = size > LONG_TEXT;
  let block = strip;
  let room = 0;
  for (const group of groupsOf(text, first, size)) {
    if (long && room-- <= 0)
      [block, room] = [strip.appendChild(put(make("div", "opd-block"), { role: "none" })), BLOCK];
    const single = group.size === 1;
    const holder = single ? option.cloneNode() : make("span", "opd-token");
    const ink = drawGlyph(group.glyph, holder);
    const add = (node, row) => (nodes.push(node), node.setAttribute("data-i", row));
    if (single) {
      add(holder, group.first);
      if (typeof group.glyph !== "string")
        holder.setAttribute("aria-label", wordOf(text, text.index[group.first]));
    }
    if (!single) {
      const cells = ink.appendChild(make("span", "opd-cells"));
      for (let row = group.first; row < group.first + group.size; row++) {
        add(
          put(cells.appendChild(byte.cloneNode()), { "aria-label": wordOf(text, text.index[row]) }),
          row,
        );
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
  const here = box(from);
  const middle = (b) => b.left + b.width / 2;
  let best = from;
  let line = null;
  let gap = Infinity;
  for (let i = from + down; nodes[i]; i += down) {
    const b = box(i);
    if (Math.abs(b.bottom - here.bottom) < 8) continue;
    line ??= b.bottom;
    if (Math.abs(b.bottom - line) >= 8) break;
    if (Math.abs(middle(b) - middle(here)) < gap)
      [best, gap] = [i, Math.abs(middle(b) - middle(here))];
  }
  return best;
};

// The rows of largest size among first … first + size, largest first, as `Channel.peaks` finds them.
export const peaksIn = ({ values, limit }, first, size, most = 5) => {
  const best = [];
  for (let i = first; i < first + size; i++) {
    const value = Math.abs(values[i]);
    if (
      !(value > 0.05 * limit) ||
      (best.length === most && value <= Math.abs(values[best[most - 1]]))
    )
      continue;
    const at = best.findIndex((j) => Math.abs(values[j]) < value);
    best.splice(at < 0 ? best.length : at, 0, i);
    if (best.length > most) best.pop();
  }
  return best;
};

const nextPeak = (peaks, from, way) => {
  const sorted = [...peaks].sort((a, b) => way * (a - b));
  return sorted.find((i) => way * (i - from) > 0) ?? sorted[0] ?? from;
};

// { node, paint(channel), channel(), nodes, glyphs, reveal() }. Clicks and keys set state.selected (rows of the data), pointing sets state.hovered;
// both, and state.brush, are marked here whoever set them. `keys(event)` may take what the strip does not: return true.
// `escape()` is what Esc does where nothing is brushed.
export const tokenStrip = ({
  text,
  first = 0,
  size = text.index.length,
  finish = "",
  label = "Tokens of the completion",
  state,
  keys,
  escape,
}) => {
  const node = put(make("div", "opd-strip"), {
    role: "listbox",
    tabindex: "0",
    dir: "auto",
    "aria-label": label,
    "data-finish": finish,
  });
  const { nodes, glyphs } = drawTokens(text, first, size, node);
  const here = () => clamp(state.get("selected") - first, 0, size - 1);
  let channel = null;
  let chosen = null;
  let pointed = null;
  let brushed = [];

  const paint = (next) => {
    const kinds = next.kind === "category";
    const lettered = kinds || channel?.kind === "category";
    const peaks = new Set(next.peaks);
    let before = -1;
    channel = next;
    for (const g of glyphs) {
      const value = shownOf(channel, first + g.first, first + g.first + g.size);
      const look = `${g.base} ${tintOf(value, channel)}`;
      if (look !== g.look) g.ink.className = g.look = look;
      if (lettered && kinds && value >= 0 && value !== before)
        g.ink.setAttribute("data-run", channel.marks?.[value] ?? value);
      else if (lettered) g.ink.removeAttribute("data-run");
      before = value;
      if (g.size > 1)
        for (let k = g.first; k < g.first + g.size; k++)
          nodes[k].className = `opd-byte ${tintOf(channel.values[first + k], channel)}`;
    }
    for (const old of node.querySelectorAll(".opd-peak")) old.classList.remove("opd-peak");
    for (const row of peaks) nodes[row - first]?.classList.add("opd-peak");
  };

  const select = (row) => {
    chosen?.setAttribute("aria-selected", "false");
    chosen = nodes[row - first] ?? null;
    if (!chosen) return node.removeAttribute("aria-activedescendant");
    chosen.id ||= unique();
    put(chosen, {
      "aria-selected": "true",
      "aria-label": `position ${row - first}, ${wordOf(text, text.index[row])}`,
    });
    node.setAttribute("aria-activedescendant", chosen.id);
  };
  const point = (row) => {
    pointed?.classList.remove("opd-pointed");
    pointed = nodes[row - first] ?? null;
    pointed?.classList.add("opd-pointed");
  };
  const mark = (runs) => {
    for (const old of brushed) old.classList.remove("opd-brushed");
    brushed = [];
    for (let k = 0; k < runs.length; k += 2) {
      const [low, high] = [runs[k], runs[k + 1] ?? runs[k]].sort((a, b) => a - b);
      brushed.push(...nodes.slice(Math.max(0, low - first), Math.max(0, high - first + 1)));
    }
    for (const one of brushed) one.classList.add("opd-brushed");
  };
  const reveal = () => chosen?.scrollIntoView({ block: "nearest", behavior: "instant" });

  const moves = {
    ArrowRight: (i) => Math.min(size - 1, i + 1),
    ArrowLeft: (i) => Math.max(0, i - 1),
    Home: () => 0,
    End: () => size - 1,
    ArrowDown: (i) => acrossLines(nodes, i, 1),
    ArrowUp: (i) => acrossLines(nodes, i, -1),
    n: (i) => nextPeak(channel?.peaks ?? [], i + first, 1) - first,
    p: (i) => nextPeak(channel?.peaks ?? [], i + first, -1) - first,
  };
  const press = (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !size) return;
    const from = here();
    const to = moves[event.key]?.(from);
    if (to === undefined && event.key !== "Escape") return keys?.(event) && event.preventDefault();
    event.preventDefault();
    if (event.key === "Escape")
      return state.get("brush").length ? state.set("brush", []) : escape?.();
    if (event.shiftKey) state.set("brush", [state.get("brush")[0] ?? from + first, to + first]);
    state.set("selected", to + first);
    reveal();
  };
  const rowAt = (event) => event.target.closest?.("[data-i]")?.dataset.i;
  const over = (event) => {
    if (rowAt(event) === undefined) return;
    const row = Number(rowAt(event));
    state.set("hovered", row);
    if (!(event.buttons & 1)) from = null;
    if (from !== null && row !== from) dragged = true;
    if (from !== null && dragged) state.set("brush", [Math.min(from, row), Math.max(from, row)]);
  };
  // A drag brushes, and selects the text too, so that what is brushed can be copied; a click lets go of both.
  let from = null;
  let dragged = false;
  node.addEventListener("pointerdown", (event) => {
    [from, dragged] = [
      event.button === 0 && rowAt(event) !== undefined ? Number(rowAt(event)) : null,
      false,
    ];
  });
  node.addEventListener("pointerover", over);
  node.addEventListener("pointerleave", () => state.set("hovered", -1));
  node.addEventListener("click", (event) => {
    if (!dragged && from !== null && !event.shiftKey) state.set("brush", []);
    if (rowAt(event) !== undefined && event.shiftKey)
      state.set("brush", [here() + first, Number(rowAt(event))]);
    if (rowAt(event) !== undefined && !dragged) state.set("selected", Number(rowAt(event)));
    [from, dragged] = [null, false];
  });
  node.addEventListener("keydown", press);
  for (const [name, act] of [
    ["selected", select],
    ["hovered", point],
    ["brush", mark],
  ]) {
    state.on(name, act);
    act(state.get(name));
  }
  return { node, paint, nodes, glyphs, reveal, first, size, channel: () => channel };
};

// Buttons that choose a channel; `press(i, tracks)` marks the chosen one, and those whose "+" added a track. Minor channels
// wait behind "more". `add(i)`, where it is given, is what "+" and a click with shift do.
export const channelButtons = (channels, choose, add = null) => {
  const node = put(make("div", "opd-buttons"), {
    role: "group",
    "aria-label": "What the colour shows",
  });
  const more = put(make("button", "opd-button opd-more-button", "more"), {
    type: "button",
    "aria-expanded": "false",
  });
  const open = (yes) =>
    put(more, { "aria-expanded": yes }) && node.toggleAttribute("data-all", yes);
  const items = channels.map((channel, i) => {
    const item = make("span", channel.minor ? "opd-choice opd-minor" : "opd-choice");
    const digit = i < 9 ? ` (key ${i + 1})` : "";
    const button = put(make("button", "opd-button", channel.label), {
      type: "button",
      "data-channel": channel.key,
      "aria-pressed": "false",
    });
    button.title = `${channel.formula ? `${channel.formula}${digit}` : `${channel.label}${digit}`}`;
    button.addEventListener("click", (event) => (event.shiftKey && add ? add(i) : choose(i)));
    item.append(button);
    if (add) {
      const plus = put(make("button", "opd-plus", "+"), {
        type: "button",
        "aria-label": `${channel.label} as a track`,
        "aria-pressed": "false",
      });
      plus.addEventListener("click", () => add(i));
      item.append(plus);
    }
    return item;
  });
  more.addEventListener("click", () => open(more.getAttribute("aria-expanded") === "false"));
  node.append(...items, ...(channels.some((c) => c.minor) ? [more] : []));
  const press = (i, tracks = []) => {
    if (channels[i]?.minor) open(true);
    items.forEach((item, k) => {
      item.firstChild.setAttribute("aria-pressed", k === i);
      const plus = item.querySelector(".opd-plus");
      const on = tracks.includes(channels[k].key);
      if (plus) put(plus, { "aria-pressed": on }).textContent = on ? "−" : "+";
    });
  };
  return { node, press };
};
