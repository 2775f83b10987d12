// Tools beside a strip: the search field and the list of keys.

/** @import { Glyph, StripState, Text } from "./types.js" */
/** @import { Strip } from "./strip.js" */

import { groupsOf, make, makeButton, put } from "./core.js";
import { nodesOf } from "./strip.js";

/**
 * The text of a strip in lower case; glyph k begins at character `starts[k]` and at row `rows[k]`.
 * @typedef {{ whole: string, starts: number[], rows: number[] }} SearchIndex
 */

/** @param {Glyph} glyph */
const rawText = (glyph) =>
  typeof glyph === "string" ? glyph : glyph[0] + glyph[1].map(([, raw]) => raw).join("");

/**
 * @param {Text} text
 * @param {number} first
 * @param {number} size
 * @returns {SearchIndex}
 */
export const searchIndex = (text, first, size) => {
  /** @type {SearchIndex} */
  const index = { whole: "", starts: [], rows: [] };
  for (const group of groupsOf(text, first, size)) {
    const raw = rawText(group.glyph);
    const lower = raw.toLowerCase();
    index.starts.push(index.whole.length);
    index.rows.push(group.first);
    // A few letters have lower forms of another length, which would shift all that follows.
    index.whole += lower.length === raw.length ? lower : raw;
  }
  return index;
};

/**
 * Return the index of the last start at or before a character.
 * @param {number[]} starts
 * @param {number} character
 */
const lastBefore = (starts, character) => {
  let low = 0;
  let high = starts.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (starts[middle] <= character) low = middle + 1;
    else high = middle;
  }
  return low - 1;
};

/**
 * Return the first and last row of each place where a string stands in the text, upper and lower
 * case alike; at most `most`.
 * @param {SearchIndex} index
 * @param {string} wanted
 * @returns {[from: number, to: number][]}
 */
export const matchesOf = ({ whole, starts, rows }, wanted, most = 2000) => {
  /** @type {[number, number][]} */
  const matches = [];
  const word = wanted.toLowerCase();
  let at = word ? whole.indexOf(word) : -1;
  while (at >= 0 && matches.length < most) {
    const end = at + word.length;
    matches.push([rows[lastBefore(starts, at)], rows[lastBefore(starts, end - 1)]]);
    at = whole.indexOf(word, end);
  }
  return matches;
};

/**
 * Make the search field of a strip.
 * @param {Strip} strip
 * @param {Text} text
 * @param {StripState} state
 * @param {(rows: number[]) => void} hear is told the first rows of all matches
 */
export const searchField = (strip, text, state, hear) => {
  const node = make("div", "opd-search");
  const told = put(make("span", "opd-soft"), { role: "status" });
  const field = put(make("input", "opd-field"), {
    type: "search",
    placeholder: "Find  /",
    "aria-label": "Find in the text",
    spellcheck: "false",
  });
  /** @type {SearchIndex | null} */
  let index = null; // made at the first search
  /** @type {[number, number][]} */
  let found = [];
  let current = -1;
  /** @type {HTMLElement[]} */
  let marked = [];
  const say = () => {
    const place = current < 0 ? `${found.length} found` : `${current + 1} of ${found.length}`;
    told.textContent = field.value ? place : "";
  };
  const firstAfterChosen = () =>
    Math.max(
      0,
      found.findIndex(([from]) => from >= state.get("selected")),
    );
  /** @param {number} to */
  const go = (to) => {
    if (!found.length) return;
    current = (to + found.length) % found.length;
    state.set("selected", found[current][0]);
    strip.reveal();
    say();
  };
  const search = () => {
    index ??= searchIndex(text, strip.first, strip.size);
    for (const one of marked) one.classList.remove("opd-found");
    found = matchesOf(index, field.value);
    marked = found.flatMap(([from, to]) => nodesOf(strip, from, to + 1));
    for (const one of marked) one.classList.add("opd-found");
    current = -1;
    say();
    hear(found.map(([from]) => from));
  };
  const leave = () => {
    field.value = "";
    search();
    strip.node.focus();
  };
  field.addEventListener("input", search);
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") leave();
    else if (event.key !== "Enter") return;
    else if (current < 0) go(firstAfterChosen());
    else go(current + (event.shiftKey ? -1 : 1));
    event.preventDefault();
  });
  node.append(field, told);
  const focus = () => {
    field.focus();
    field.select();
  };
  return { node, focus };
};

/**
 * Make the list of keys, and the button that shows it.
 * @param {[keys: string, meaning: string][]} entries
 */
export const helpList = (entries) => {
  const node = make("div", "opd-help");
  node.hidden = true;
  const open = put(makeButton("", "?"), { "aria-label": "Keys", "aria-expanded": "false" });
  for (const [keys, meaning] of entries) {
    const line = make("div", "opd-help-line");
    const caps = make("span", "opd-keys");
    caps.append(...keys.split(" ").map((key) => make("span", "opd-cap", key)));
    line.append(caps, make("span", "", meaning));
    node.append(line);
  }
  const toggle = () => {
    node.hidden = !node.hidden;
    put(open, { "aria-expanded": !node.hidden });
  };
  open.addEventListener("click", toggle);
  return { button: open, node, toggle };
};
