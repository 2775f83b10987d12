// Marks: labels and comments on tokens of a completion. The trait `marks` holds them; where the view
// is live, Python checks and saves every change.

/** @import { Channel, Mark, MarksPayload, State } from "./types.js" */

import {
  clamp,
  define,
  drawLegend,
  isModified,
  liveRegion,
  make,
  makeBar,
  makeButton,
  promptBox,
  put,
  rowOfEvent,
  titleOf,
  unique,
  wordAt,
} from "./core.js";
import { mapOfLong } from "./minimap.js";
import { tokenStrip } from "./strip.js";

// ── Model ────────────────────────────────────────────────────────────────────────────────────────

/** @param {Mark} one @param {Mark} other */
const overlap = (one, other) =>
  one.sample === other.sample &&
  one.position < other.position + other.length &&
  other.position < one.position + one.length;

/**
 * Return the marks with a new one in place of those that it overlaps, in the order of the text.
 * @param {Mark[]} marks
 * @param {Mark} mark
 */
export const withMark = (marks, mark) =>
  [...marks.filter((one) => !overlap(one, mark)), mark].sort(
    (a, b) => a.sample - b.sample || a.position - b.position,
  );

/**
 * Return the mark on a token; undefined for none.
 * @param {Mark[]} marks
 * @param {number} sample
 * @param {number} position
 */
export const markAt = (marks, sample, position) =>
  marks.find((one) => overlap(one, { ...one, sample, position, length: 1 }));

/**
 * Return the labels of a completion as a channel of its rows.
 * @param {Mark[]} marks those of the completion
 * @param {number} size
 * @returns {Channel}
 */
export const channelOfMarks = (marks, size) => {
  const names = [...new Set(marks.map(({ label }) => label))];
  const values = new Float32Array(size).fill(-1);
  for (const { position, length, label } of marks) {
    values.fill(names.indexOf(label), position, position + length);
  }
  return {
    key: "label",
    label: "label",
    unit: "",
    kind: "category",
    less: "",
    more: "",
    limit: Math.max(1, names.length - 1),
    names,
    marks: names.map((_, i) => String(i + 1)),
    hues: [],
    values,
    peaks: [],
  };
};

/**
 * Return first position and length of what is brushed, or of the chosen token alone.
 * @param {number[]} brush
 * @param {number} selected
 */
export const chosenRange = (brush, selected) => {
  const [from, to] = brush.length ? [brush[0], brush[1] ?? brush[0]] : [selected, selected];
  return { position: Math.min(from, to), length: Math.abs(to - from) + 1 };
};

// ── Parts ────────────────────────────────────────────────────────────────────────────────────────

/** @param {MarksPayload} data */
const formParts = ({ longest }) => {
  const node = put(make("div", "opd-form"), {
    role: "group",
    "aria-label": "Label of the chosen tokens",
  });
  const place = make("div", "opd-place");
  const known = put(make("datalist"), { id: unique() });
  const label = put(make("input"), { maxlength: longest[0], list: known.id, autocomplete: "off" });
  const comment = put(make("textarea"), { maxlength: longest[1], rows: 1 });
  const fieldOf = (/** @type {string} */ words, /** @type {HTMLElement} */ field, look = "") => {
    const holder = make("label", look, words);
    holder.append(field);
    return holder;
  };
  const save = makeButton("opd-mark-button", "Label");
  const drop = makeButton("opd-mark-button", "Take away");
  node.append(place, known, fieldOf("label (m)", label), fieldOf("comment", comment, "opd-wide"));
  node.append(save, drop);
  return { node, place, known, label, comment, save, drop };
};

/** @param {MarksPayload} data @param {State} state @param {(row: number) => void} choose */
const markList = ({ text, sample }, state, choose) => {
  const node = put(make("div", "opd-list"), {
    role: "listbox",
    tabindex: "0",
    "aria-label": "Labels of this completion",
  });
  const own = () => state.get("marks").filter((mark) => mark.sample === sample);
  const at = () =>
    own().indexOf(/** @type {Mark} */ (markAt(own(), sample, state.get("selected"))));
  const mark = () => {
    const chosen = at();
    [...node.children].forEach((line, i) => put(line, { "aria-selected": i === chosen }));
  };
  /** @param {Channel} channel */
  const draw = (channel) => {
    const lines = own().map(({ position, length, label, comment }) => {
      const line = put(make("div", "opd-mark-line"), {
        role: "option",
        "aria-selected": "false",
        "data-row": position,
      });
      const rows = Array.from({ length: Math.min(length, 8) }, (_, k) => position + k);
      const words = rows.map((row) => wordAt(text, row)).join(" ");
      const name = make("span", "opd-item");
      const i = channel.names?.indexOf(label) ?? 0;
      const badge = make("span", `opd-kind opd-k opd-k${i % 8}`, channel.marks?.[i]);
      name.append(badge, make("span", "", label));
      line.append(
        make("span", "opd-soft", String(position)),
        make("span", "opd-word", words),
        name,
      );
      line.append(put(make("span", "", comment), { dir: "auto" }));
      return line;
    });
    node.replaceChildren(...lines);
    node.hidden = !lines.length;
    mark();
  };
  node.addEventListener("click", (event) => {
    const row = rowOfEvent(event);
    if (row >= 0) choose(row);
  });
  node.addEventListener("keydown", (event) => {
    const steps = { ArrowDown: 1, ArrowUp: -1 };
    const step = steps[/** @type {"ArrowDown"} */ (event.key)];
    if (!step || isModified(event)) return;
    event.preventDefault();
    choose(own()[clamp(at() + step, 0, own().length - 1)].position);
  });
  return { node, draw, mark, own };
};

/**
 * What is kept, and where: a file of Python's, or one that the page offers.
 * @param {MarksPayload} data
 * @param {State} state
 */
const keptLine = ({ file, is_kept: isKept }, state) => {
  const node = make("div", "opd-said opd-soft");
  const told = make("span");
  const offer = makeButton("opd-mark-button", "Save as a file");
  offer.addEventListener("click", () => {
    const content = JSON.stringify({ ...file, marks: state.get("marks") }, null, 1);
    const link = put(make("a"), { download: "trace.labels.json" }); // never a part of the page
    link.href = `data:application/json;charset=utf-8,${encodeURIComponent(content)}`;
    link.click();
  });
  node.append(told, offer);
  const draw = () => {
    const marks = state.get("marks");
    const count = `${marks.length} ${marks.length === 1 ? "label" : "labels"} in the trace`;
    const where = isKept
      ? "saved beside the trace at every change"
      : "kept by Python, not in a file";
    told.textContent = `${count}; ${state.live ? where : "this page forgets them when it is closed"}`;
    offer.hidden = state.live;
  };
  return { node, draw };
};

/**
 * Make the form for the chosen tokens; `leave` gives the keyboard back to the strip.
 * @param {MarksPayload} data
 * @param {State} state
 * @param {() => void} leave
 */
const labelForm = (data, state, leave) => {
  const { text, sample } = data;
  const size = text.index.length;
  const form = formParts(data);
  const spoken = liveRegion();
  form.node.append(spoken);
  const drop = () => {
    const marks = state.get("marks");
    const here = markAt(marks, sample, state.get("selected"));
    if (!here) return;
    state.set(
      "marks",
      marks.filter((one) => one !== here),
    );
  };
  const apply = () => {
    const label = form.label.value.trim();
    if (!label || !size) return;
    const range = chosenRange(state.get("brush"), state.get("selected"));
    const mark = { sample, ...range, label, comment: form.comment.value };
    state.set("brush", []);
    state.set("marks", withMark(state.get("marks"), mark));
    spoken.textContent = `labelled ${label}`;
    leave();
  };
  form.label.addEventListener("keydown", (event) => {
    if (event.key === "Escape") leave();
    else if (event.key === "Enter") apply();
    else return;
    event.preventDefault();
  });
  form.save.addEventListener("click", apply);
  form.drop.addEventListener("click", drop);
  const show = () => {
    const marks = state.get("marks");
    const { position, length } = chosenRange(state.get("brush"), state.get("selected"));
    const here = markAt(marks, sample, position);
    form.label.value = here?.label ?? "";
    form.comment.value = here?.comment ?? "";
    form.drop.disabled = !here;
    const word = position >= 0 && position < size ? wordAt(text, position) : "";
    form.place.textContent =
      length > 1 ? `${length} tokens from position ${position}` : `${word} at position ${position}`;
    const labels = new Set(marks.map(({ label }) => label));
    form.known.replaceChildren(...[...labels].map((value) => put(make("option"), { value })));
  };
  const focus = () => {
    form.label.focus();
    form.label.select();
  };
  return { node: form.node, show, drop, focus };
};

define("marks", ({ box, data, state }) => {
  const { text, finish } = data;
  const form = labelForm(data, state, () => strip.node.focus());
  /** @param {KeyboardEvent} event */
  const keys = ({ key }) => {
    if (key === "m") form.focus();
    else if (key === "Delete" || key === "Backspace") form.drop();
    else return false;
    return true;
  };
  const strip = tokenStrip({ text, finish, state, keys });
  const map = mapOfLong(strip, []);
  const list = markList(data, state, (row) => state.set("selected", row));
  const kept = keptLine(data, state);
  const legend = make("div");
  const hint = make("span", "opd-soft", "m: write a label; Shift + arrows: several tokens");
  box.append(...titleOf(data), promptBox(data.prompt), makeBar(hint, legend));
  box.append(...(map ? [map.node] : []), strip.node, form.node, list.node, kept.node);

  const showChosen = () => {
    form.show();
    list.mark();
  };
  const redraw = () => {
    const channel = channelOfMarks(list.own(), strip.size);
    strip.paint(channel);
    drawLegend(legend, channel);
    legend.hidden = !list.own().length;
    list.draw(channel);
    kept.draw();
    map?.draw([channel], { peaks: [], found: [], chosen: state.get("selected") });
    showChosen();
  };
  state.on("marks", redraw);
  state.on("brush", showChosen);
  state.on("selected", (row) => {
    map?.mark(row);
    showChosen();
  });
  redraw();
  return map?.close;
});
