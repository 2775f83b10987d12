// Tools beside a strip: the search field and the list of keys.

import { groupsOf, make, put } from "./core.js";

// The text of the strip in lower case, and where each glyph begins in it.
const searchable = (text, first, size) => {
  const starts = [];
  const rows = [];
  let whole = "";
  for (const group of groupsOf(text, first, size)) {
    const { glyph } = group;
    const raw =
      typeof glyph === "string" ? glyph : glyph[0] + glyph[1].map((part) => part[1]).join("");
    const lower = raw.toLowerCase();
    starts.push(whole.length);
    rows.push(group.first);
    whole += lower.length === raw.length ? lower : raw;
  }
  return { whole, starts, rows };
};

const lastBefore = (starts, at) => {
  let low = 0;
  let high = starts.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (starts[middle] <= at) low = middle + 1;
    else high = middle;
  }
  return low - 1;
};

// [[first row, last row], …] of where a plain string stands in the text, upper and lower case alike; at most `most`.
const matchesOf = ({ whole, starts, rows }, wanted, most = 2000) => {
  const out = [];
  const word = wanted.toLowerCase();
  for (
    let at = word ? whole.indexOf(word) : -1;
    at >= 0 && out.length < most;
    at = whole.indexOf(word, at + word.length)
  ) {
    out.push([rows[lastBefore(starts, at)], rows[lastBefore(starts, at + word.length - 1)]]);
  }
  return out;
};

// { node, focus } of a search field for a strip; `heard(rows)` is told of the first rows of all matches.
export const searchField = (strip, text, state, heard = () => {}) => {
  const node = make("div", "opd-search");
  const told = put(make("span", "opd-soft"), { role: "status" });
  const field = put(make("input", "opd-field"), {
    type: "search",
    placeholder: "Find  /",
    "aria-label": "Find in the text",
    spellcheck: "false",
  });
  let index = null;
  let found = [];
  let at = -1;
  let marked = [];
  const say = () =>
    (told.textContent = !field.value
      ? ""
      : at < 0
        ? `${found.length} found`
        : `${at + 1} of ${found.length}`);
  const nearest = () =>
    Math.max(
      0,
      found.findIndex(([from]) => from >= state.get("selected")),
    );
  const go = (to) => {
    if (!found.length) return;
    at = (to + found.length) % found.length;
    state.set("selected", found[at][0]);
    strip.reveal();
    say();
  };
  const look = () => {
    index ??= searchable(text, strip.first, strip.size);
    for (const one of marked) one.classList.remove("opd-found");
    found = matchesOf(index, field.value);
    marked = found.flatMap(([from, to]) =>
      strip.nodes.slice(from - strip.first, to - strip.first + 1),
    );
    for (const one of marked) one.classList.add("opd-found");
    at = -1;
    say();
    heard(found.map(([from]) => from));
  };
  field.addEventListener("input", look);
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter") go(at < 0 ? nearest() : event.shiftKey ? at - 1 : at + 1);
    else if (event.key === "Escape") ((field.value = ""), look(), strip.node.focus());
    else return;
    event.preventDefault();
  });
  node.append(field, told);
  return { node, focus: () => (field.focus(), field.select()) };
};

// { button, node, toggle } of a list of [keys, what they do].
export const helpList = (entries) => {
  const node = make("div", "opd-help");
  const button = put(make("button", "opd-button", "?"), {
    type: "button",
    "aria-label": "Keys",
    "aria-expanded": "false",
  });
  for (const [keys, meaning] of entries) {
    const line = make("div", "opd-help-line");
    const held = make("span", "opd-keys");
    held.append(...keys.split(" ").map((key) => make("span", "opd-cap", key)));
    line.append(held, make("span", "", meaning));
    node.append(line);
  }
  node.hidden = true;
  const toggle = () => button.setAttribute("aria-expanded", String(!(node.hidden = !node.hidden)));
  button.addEventListener("click", toggle);
  return { button, node, toggle };
};
