// The token strip: the text itself with one option per token, coloured by a channel, walked by
// keys, in step with `state`.

/** @import { Channel, Group, Scale, StripState, Text, Words } from "./types.js" */

import {
  clamp,
  closest,
  drawGlyph,
  groupsOf,
  isModified,
  isNamed,
  make,
  makeButton,
  put,
  tintOf,
  unique,
  wordAt,
} from "./core.js";

const BLOCK = 400; // glyphs per block of a long text; blocks out of sight need no layout
const LONG_TEXT = 2000;
export const TALL_STRIP = 400; // tokens from which a strip scrolls in its own box

/**
 * A glyph of the strip: the node that takes the colour, and the rows that it shows, counted from
 * the strip's first. `isOwn`: the student wrote it.
 * @typedef {{ ink: HTMLElement, base: string, first: number, size: number, look: string, isOwn: boolean }} DrawnGlyph
 *
 * What is drawn: the strip's node, a node per token, the glyphs, and the rows.
 * @typedef {object} Tokens
 * @property {HTMLElement} node
 * @property {HTMLElement[]} nodes
 * @property {DrawnGlyph[]} glyphs
 * @property {number} first
 * @property {number} size
 *
 * @typedef {Tokens & { paint: (channel: Channel) => void, reveal: () => void }} Strip
 *
 * Takes the keys that the strip does not know; returns true if it used the key.
 * @typedef {(event: KeyboardEvent) => boolean} KeyHandler
 */

// ── Values of several rows ───────────────────────────────────────────────────────────────────────

/** @param {ArrayLike<number>} values @param {number} from @param {number} to */
export const strongest = (values, from, to) => {
  let best = NaN;
  for (let i = from; i < to; i++) {
    if (Number.isNaN(best) || Math.abs(values[i]) > Math.abs(best)) best = values[i];
  }
  return best;
};

/**
 * Return what a glyph of rows from … to - 1 shows: of numbers the largest size, so that peaks
 * survive; of categories the first.
 * @param {Scale & { values: ArrayLike<number> }} channel
 * @param {number} from
 * @param {number} to
 */
export const shownOf = (channel, from, to) =>
  isNamed(channel) ? channel.values[from] : strongest(channel.values, from, to);

/**
 * Return the rows of largest size among first … first + size, largest first, as `Channel.peaks`
 * finds them in Python.
 * @param {{ values: ArrayLike<number>, limit: number }} channel
 * @param {number} first
 * @param {number} size
 */
export const peaksIn = ({ values, limit }, first, size, most = 5) => {
  /** @type {number[]} */
  const best = [];
  for (let i = first; i < first + size; i++) {
    const value = Math.abs(values[i]);
    const isTooSmall = best.length === most && value <= Math.abs(values[best[most - 1]]);
    if (!(value > 0.05 * limit) || isTooSmall) continue;
    const place = best.findIndex((j) => Math.abs(values[j]) < value);
    best.splice(place < 0 ? best.length : place, 0, i);
    if (best.length > most) best.pop();
  }
  return best;
};

/**
 * Return the next peak to the right (step 1) or left (-1), going round at the end.
 * @param {number[]} peaks
 * @param {number} from
 * @param {number} step
 */
export const nextPeak = (peaks, from, step) => {
  const sorted = [...peaks].sort((a, b) => step * (a - b));
  return sorted.find((row) => step * (row - from) > 0) ?? sorted[0] ?? from;
};

// ── Drawing ──────────────────────────────────────────────────────────────────────────────────────

/** @param {string} look */
const option = (look) => put(make("span", look), { role: "option", "aria-selected": "false" });

/**
 * Return the function that says which node the next glyph goes into: the strip, or of a long text
 * the present block.
 * @param {HTMLElement} node
 * @param {number} size
 */
const blocksOf = (node, size) => {
  if (size <= LONG_TEXT) return () => node;
  let block = node;
  let room = 0;
  return (/** @type {boolean} */ endsLine) => {
    // A block ends with a line where it can.
    if (endsLine && room < BLOCK / 2) room = 0;
    if (room <= 0) {
      block = node.appendChild(put(make("div", "opd-block"), { role: "none" }));
      room = BLOCK + 1;
    }
    room -= 1;
    return block;
  };
};

/**
 * Return the function that says which node a row goes into, and whether the student wrote it: of a
 * conversation a band for each turn, with the text between two turns greyed; else as `blocksOf`.
 * @param {Text} text
 * @param {number} first
 * @param {number} size
 * @param {HTMLElement} node
 * @returns {(row: number, endsLine: boolean) => { into: HTMLElement, isOwn: boolean }}
 */
const placesOf = (text, first, size, node) => {
  const turns = (text.turns ?? []).filter(
    ([start, rows]) => start < first + size && start + rows > first,
  );
  if (!turns.length) {
    const blockFor = blocksOf(node, size);
    return (_row, endsLine) => ({ into: blockFor(endsLine), isOwn: true });
  }
  /** @type {HTMLElement | null} */
  let band = null;
  let shown = -1; // the turn of the band
  let at = -1; // the stretch that the last row was in
  return (row) => {
    while (at + 1 < turns.length && turns[at + 1][0] <= row) at += 1;
    const [, , turn, isOwn] = turns[Math.max(at, 0)];
    if (!band || turn !== shown) {
      const look = turn % 2 ? "opd-turn opd-odd" : "opd-turn";
      band = node.appendChild(put(make("div", look), { role: "none" }));
      put(band, { "data-turn": `turn ${turn + 1}` });
      shown = turn;
    }
    return { into: band, isOwn };
  };
};

/**
 * Draw rows first … first + size. Several tokens that are one glyph (bytes of an emoji) lie as
 * cells under it.
 * @param {Text} text
 * @param {number} first
 * @param {number} size
 * @param {HTMLElement} node
 * @returns {Tokens}
 */
const drawTokens = (text, first, size, node) => {
  /** @type {HTMLElement[]} */
  const nodes = [];
  // Cloning is faster than making each anew.
  const token = option("opd-token");
  const byte = option("opd-byte");
  const cloneOf = (/** @type {HTMLElement} */ model, /** @type {number} */ row) => {
    const clone = /** @type {HTMLElement} */ (model.cloneNode());
    nodes.push(put(clone, { "data-i": row }));
    return clone;
  };
  const drawSingle = (/** @type {Group} */ group) => {
    const holder = cloneOf(token, group.first);
    if (typeof group.glyph !== "string") put(holder, { "aria-label": wordAt(text, group.first) });
    return { holder, ink: drawGlyph(group.glyph, holder) };
  };
  const drawSeveral = (/** @type {Group} */ group) => {
    const holder = make("span", "opd-token");
    const ink = drawGlyph(group.glyph, holder);
    const cells = ink.appendChild(make("span", "opd-cells"));
    for (let row = group.first; row < group.first + group.size; row++) {
      cells.append(put(cloneOf(byte, row), { "aria-label": wordAt(text, row) }));
    }
    return { holder, ink };
  };
  const placeOf = placesOf(text, first, size, node);
  let endsLine = false;
  const glyphs = groupsOf(text, first, size).map((group) => {
    const { holder, ink } = group.size === 1 ? drawSingle(group) : drawSeveral(group);
    const { into, isOwn } = placeOf(group.first, endsLine);
    into.append(holder);
    holder.classList.toggle("opd-reply", !isOwn);
    endsLine = ink.textContent.endsWith("\n");
    const base = ink.className;
    return { ink, base, first: group.first - first, size: group.size, look: "", isOwn };
  });
  if (!size) node.append(make("span", "opd-soft", "(no tokens)"));
  return { node, nodes, glyphs, first, size };
};

/**
 * Tell whether a run of a category begins at a glyph.
 * @param {DrawnGlyph} glyph
 * @param {Channel} channel
 * @param {number} value
 * @param {number} before the value of the glyph before
 */
const beginsRun = ({ isOwn }, { kind }, value, before) =>
  kind === "category" && isOwn && value >= 0 && value !== before;

/**
 * Return the function that colours a strip by a channel.
 * @param {Tokens} tokens
 */
const painter = ({ node, nodes, glyphs, first }) => {
  let wasCategory = false;
  /** @param {DrawnGlyph} glyph @param {Channel} channel @param {number} value */
  const colour = (glyph, channel, value) => {
    // Numbers on what a tool or a user said are not the student's.
    const look = glyph.isOwn ? `${glyph.base} ${tintOf(value, channel)}` : glyph.base;
    if (look !== glyph.look) {
      glyph.ink.className = look;
      glyph.look = look;
    }
    if (glyph.size === 1) return;
    for (let i = glyph.first; i < glyph.first + glyph.size; i++) {
      nodes[i].className = `opd-byte ${tintOf(channel.values[first + i], channel)}`;
    }
  };
  /** @param {Channel} channel */
  const paint = (channel) => {
    const isCategory = channel.kind === "category";
    let before = -1;
    for (const glyph of glyphs) {
      const from = first + glyph.first;
      const value = shownOf(channel, from, from + glyph.size);
      colour(glyph, channel, value);
      // The letter of a category stands where a run of it begins.
      if (beginsRun(glyph, channel, value, before)) {
        put(glyph.ink, { "data-run": channel.marks?.[value] ?? value });
      } else if (isCategory || wasCategory) {
        glyph.ink.removeAttribute("data-run");
      }
      before = value;
    }
    wasCategory = isCategory;
    for (const old of node.querySelectorAll(".opd-peak")) old.classList.remove("opd-peak");
    for (const row of channel.peaks) nodes[row - first]?.classList.add("opd-peak");
  };
  return paint;
};

/**
 * Mark the chosen token, the one pointed at and what is brushed, whoever set them.
 * @param {Tokens} tokens
 * @param {Text} text
 * @param {StripState} state
 */
const showMarks = ({ node, nodes, first }, text, state) => {
  /** @type {HTMLElement | null} */
  let chosen = null;
  /** @type {HTMLElement | null} */
  let pointed = null;
  /** @type {HTMLElement[]} */
  let brushed = [];
  /** @param {number} row */
  const select = (row) => {
    chosen?.setAttribute("aria-selected", "false");
    chosen = nodes[row - first] ?? null;
    if (!chosen) {
      node.removeAttribute("aria-activedescendant");
      return;
    }
    chosen.id ||= unique();
    const name = `position ${row - first}, ${wordAt(text, row)}`;
    put(chosen, { "aria-selected": "true", "aria-label": name });
    put(node, { "aria-activedescendant": chosen.id });
  };
  /** @param {number} row */
  const point = (row) => {
    pointed?.classList.remove("opd-pointed");
    pointed = nodes[row - first] ?? null;
    pointed?.classList.add("opd-pointed");
  };
  /** @param {number[]} runs first and last row of each run */
  const brush = (runs) => {
    for (const old of brushed) old.classList.remove("opd-brushed");
    brushed = [];
    for (let k = 0; k < runs.length; k += 2) {
      const [low, high] = [runs[k], runs[k + 1] ?? runs[k]].sort((a, b) => a - b);
      brushed.push(...nodes.slice(Math.max(0, low - first), Math.max(0, high - first + 1)));
    }
    for (const one of brushed) one.classList.add("opd-brushed");
  };
  state.on("selected", select);
  state.on("hovered", point);
  state.on("brush", brush);
  select(state.get("selected"));
  point(state.get("hovered"));
  brush(state.get("brush"));
  return { reveal: () => chosen?.scrollIntoView({ block: "nearest", behavior: "instant" }) };
};

// ── Input ────────────────────────────────────────────────────────────────────────────────────────

/**
 * Return the token on the next line (step 1) or the one before (-1) that lies nearest below or
 * above.
 * @param {HTMLElement[]} nodes
 * @param {number} from
 * @param {number} step
 */
const acrossLines = (nodes, from, step) => {
  const boxOf = (/** @type {number} */ i) =>
    nodes[i].getClientRects()[0] ?? nodes[i].getBoundingClientRect();
  const middleOf = (/** @type {DOMRect} */ box) => box.left + box.width / 2;
  const here = boxOf(from);
  let best = from;
  let line = null;
  let gap = Infinity;
  for (let i = from + step; nodes[i]; i += step) {
    const box = boxOf(i);
    if (Math.abs(box.bottom - here.bottom) < 8) continue;
    line ??= box.bottom;
    if (Math.abs(box.bottom - line) >= 8) break;
    const distance = Math.abs(middleOf(box) - middleOf(here));
    if (distance < gap) {
      best = i;
      gap = distance;
    }
  }
  return best;
};

/**
 * Keys walk the tokens; with shift they brush.
 * @param {Tokens} tokens
 * @param {StripState} state
 * @param {{ peaks: () => number[], reveal: () => void, keys?: KeyHandler, escape?: () => void }} acts
 */
const listenToKeys = ({ node, nodes, first, size }, state, { peaks, reveal, keys, escape }) => {
  /** @type {Record<string, (i: number) => number>} */
  const moves = {
    ArrowRight: (i) => Math.min(size - 1, i + 1),
    ArrowLeft: (i) => Math.max(0, i - 1),
    Home: () => 0,
    End: () => size - 1,
    ArrowDown: (i) => acrossLines(nodes, i, 1),
    ArrowUp: (i) => acrossLines(nodes, i, -1),
    n: (i) => nextPeak(peaks(), i + first, 1) - first,
    p: (i) => nextPeak(peaks(), i + first, -1) - first,
  };
  const letGo = () => {
    if (state.get("brush").length) state.set("brush", []);
    else escape?.();
  };
  /** @param {number} from @param {number} to @param {boolean} isBrush */
  const goTo = (from, to, isBrush) => {
    if (isBrush) state.set("brush", [state.get("brush")[0] ?? from + first, to + first]);
    state.set("selected", to + first);
    reveal();
  };
  node.addEventListener("keydown", (event) => {
    if (isModified(event) || !size) return;
    const from = clamp(state.get("selected") - first, 0, size - 1);
    const to = moves[event.key]?.(from);
    if (event.key === "Escape") letGo();
    else if (to !== undefined) goTo(from, to, event.shiftKey);
    else if (!keys?.(event)) return;
    event.preventDefault();
  });
};

/**
 * A click selects. A drag brushes, and selects the text too, so that what is brushed can be copied;
 * a click lets go of both.
 * @param {Tokens} tokens
 * @param {StripState} state
 */
const listenToPointer = ({ node, first, size }, state) => {
  /** @type {number | null} */
  let start = null; // of a drag
  let isDragged = false;
  const rowUnder = (/** @type {Event} */ event) => {
    const row = closest(event, "[data-i]")?.dataset.i;
    return row === undefined ? null : Number(row);
  };
  node.addEventListener("pointerdown", (event) => {
    start = event.button === 0 ? rowUnder(event) : null;
    isDragged = false;
  });
  node.addEventListener("pointerover", (event) => {
    const row = rowUnder(event);
    if (row === null) return;
    state.set("hovered", row);
    if (!(event.buttons & 1)) start = null;
    if (start === null) return;
    if (row !== start) isDragged = true;
    if (isDragged) state.set("brush", [Math.min(start, row), Math.max(start, row)]);
  });
  node.addEventListener("pointerleave", () => state.set("hovered", -1));
  node.addEventListener("click", (event) => {
    const row = rowUnder(event);
    if (!isDragged && start !== null && !event.shiftKey) state.set("brush", []);
    if (row !== null && event.shiftKey) {
      state.set("brush", [first + clamp(state.get("selected") - first, 0, size - 1), row]);
    }
    if (row !== null && !isDragged) state.set("selected", row);
    start = null;
    isDragged = false;
  });
};

/**
 * Draw a strip. Clicks and keys set `selected` (a row of the payload), pointing sets `hovered`.
 * @param {object} options
 * @param {Text} options.text
 * @param {number} [options.first]
 * @param {number} [options.size]
 * @param {string} [options.finish] why the text ends
 * @param {string} [options.label]
 * @param {StripState} options.state
 * @param {KeyHandler} [options.keys] further keys
 * @param {() => void} [options.escape] what Escape does where nothing is brushed
 * @returns {Strip}
 */
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
  const tokens = drawTokens(text, first, size, node);
  const paintTokens = painter(tokens);
  /** @type {Channel | null} */
  let shown = null;
  /** @param {Channel} channel */
  const paint = (channel) => {
    shown = channel;
    paintTokens(channel);
  };
  const peaks = () => shown?.peaks ?? [];
  const { reveal } = showMarks(tokens, text, state);
  listenToKeys(tokens, state, { peaks, reveal, keys, escape });
  listenToPointer(tokens, state);
  return { ...tokens, paint, reveal };
};

/**
 * Return the token nodes of rows from … to - 1, as far as the strip has them.
 * @param {Tokens} strip
 * @param {number} from
 * @param {number} to
 */
export const nodesOf = ({ nodes, first }, from, to) =>
  nodes.slice(Math.max(0, from - first), Math.max(0, to - first));

// ── Channel buttons ──────────────────────────────────────────────────────────────────────────────

/**
 * @param {Words} channel
 * @param {number} i
 * @param {(i: number) => void} choose
 * @param {((i: number) => void) | null} add
 */
const channelChoice = (channel, i, choose, add) => {
  const node = make("span", channel.minor ? "opd-choice opd-minor" : "opd-choice");
  const pick = makeButton("", channel.label);
  put(pick, { "data-channel": channel.key, "aria-pressed": "false" });
  pick.title = `${channel.formula || channel.label}${i < 9 ? ` (key ${i + 1})` : ""}`;
  pick.addEventListener("click", (event) => (event.shiftKey && add ? add(i) : choose(i)));
  node.append(pick);
  if (!add) return { node, pick, plus: null };
  const plus = put(make("button", "opd-plus", "+"), {
    type: "button",
    "aria-label": `${channel.label} as a track`,
    "aria-pressed": "false",
  });
  plus.addEventListener("click", () => add(i));
  node.append(plus);
  return { node, pick, plus };
};

/**
 * Make the buttons that choose a channel. Minor channels wait behind "more". `press(i, tracks)`
 * marks the chosen one, and those whose "+" added a track.
 * @param {Words[]} channels
 * @param {(i: number) => void} choose
 * @param {((i: number) => void) | null} [add] what "+" and a click with shift do
 */
export const channelButtons = (channels, choose, add = null) => {
  const node = put(make("div", "opd-buttons"), {
    role: "group",
    "aria-label": "What the colour shows",
  });
  const more = put(makeButton("opd-more-button", "more"), { "aria-expanded": "false" });
  const open = (/** @type {boolean} */ isOpen) => {
    put(more, { "aria-expanded": isOpen });
    node.toggleAttribute("data-all", isOpen);
  };
  more.addEventListener("click", () => open(more.getAttribute("aria-expanded") === "false"));
  const choices = channels.map((channel, i) => channelChoice(channel, i, choose, add));
  node.append(...choices.map((choice) => choice.node));
  if (channels.some((channel) => channel.minor)) node.append(more);
  /** @param {number} chosen @param {string[]} [tracks] */
  const press = (chosen, tracks = []) => {
    if (channels[chosen]?.minor) open(true);
    choices.forEach(({ pick, plus }, i) => {
      put(pick, { "aria-pressed": i === chosen });
      if (!plus) return;
      const isTrack = tracks.includes(channels[i].key);
      put(plus, { "aria-pressed": isTrack }).textContent = isTrack ? "−" : "+";
    });
  };
  return { node, press };
};
