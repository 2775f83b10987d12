// Disagreements: groups of places where the teacher wanted another token, and the places of the
// chosen group in their texts.

/** @import { DisagreementGroup, DisagreementsPayload, State } from "./types.js" */

import {
  clamp,
  completionAt,
  define,
  isModified,
  liveRegion,
  make,
  makeBar,
  makeButton,
  number,
  percent,
  put,
  rowOfEvent,
  titleOf,
  unique,
} from "./core.js";
import { contextOf } from "./regimes_model.js";
import { glyphCell } from "./regimes_parts.js";

const MOST_PLACES = 100;

// ── Model ────────────────────────────────────────────────────────────────────────────────────────

/**
 * Return the rows of every group, cut out of the flat list.
 * @param {{ count: number }[]} groups
 * @param {ArrayLike<number>} row
 */
export const rowsOfGroups = (groups, row) => {
  let start = 0;
  return groups.map(({ count }) => {
    const rows = Array.from({ length: count }, (_, k) => row[start + k]);
    start += count;
    return rows;
  });
};

/**
 * Return the places of the groups in the order asked for; equal ones stay as they are.
 * @param {{ count: number, share: number }[]} groups
 * @param {string} by
 */
export const orderOfGroups = (groups, by) => {
  const size = (/** @type {number} */ i) => (by === "count" ? groups[i].count : groups[i].share);
  return groups.map((_, i) => i).sort((a, b) => size(b) - size(a));
};

// ── Parts ────────────────────────────────────────────────────────────────────────────────────────

/**
 * Make a list that keys walk; `choose` hears the place of the chosen line.
 * @param {string} look
 * @param {string} label
 * @param {() => number} chosen
 * @param {(at: number) => void} choose
 */
const walkedList = (look, label, chosen, choose) => {
  const node = put(make("div", look), { role: "listbox", tabindex: "0", "aria-label": label });
  node.addEventListener("keydown", (event) => {
    const last = node.children.length - 1;
    const at = chosen();
    /** @type {Record<string, number>} */
    const steps = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: last };
    const to = steps[event.key];
    if (to === undefined || isModified(event) || last < 0) return;
    event.preventDefault();
    choose(clamp(to, 0, last));
  });
  const mark = () => {
    const at = chosen();
    [...node.children].forEach((line, i) => put(line, { "aria-selected": i === at }));
    const line = node.children[at];
    if (!line) {
      node.removeAttribute("aria-activedescendant");
      return;
    }
    put(node, { "aria-activedescendant": line.id });
    const { top, bottom } = line.getBoundingClientRect();
    const box = node.getBoundingClientRect();
    if (top < box.top) node.scrollTop += top - box.top;
    if (bottom > box.bottom) node.scrollTop += bottom - box.bottom;
  };
  return { node, mark };
};

/** @param {string} look */
const optionLine = (look) =>
  put(make("div", look), { role: "option", "aria-selected": "false", id: unique() });

/** @param {DisagreementGroup} group @param {number} i @param {number} most */
const groupLine = (group, i, most) => {
  const line = put(optionLine("opd-group"), { "data-row": i });
  const student = make("span", "opd-word");
  if (group.before) student.append(make("span", "opd-soft", `${group.before} `));
  student.append(make("b", "opd-of-student", group.student));
  const teacher = make("span", "opd-word");
  teacher.append(make("b", "opd-of-teacher", group.teacher));
  const track = make("span", "opd-track");
  const fill = track.appendChild(make("span", "opd-fill"));
  fill.style.width = `${most ? (100 * group.share) / most : 0}%`;
  const count = make("span", "opd-number", `${group.count} ×`);
  count.title = `in ${group.completions} completions, by ${number(group.preference)} nats on average`;
  const arrow = make("span", "opd-soft", "→");
  line.append(student, arrow, teacher, count, track);
  line.append(make("span", "opd-number", percent(group.share)));
  return line;
};

/** @param {DisagreementsPayload} data */
const placeLines = ({ text }) => {
  const inContext = contextOf(text);
  return (/** @type {number} */ row) => {
    const { completion, before, here, after } = inContext(row);
    const line = put(optionLine("opd-place"), { "data-row": row });
    line.append(
      make("span", "opd-soft", `${completion.sample}:${row - completion.first}`),
      glyphCell("opd-before", before),
      glyphCell("opd-kwic-here", [here]),
      glyphCell("opd-after", after),
    );
    return line;
  };
};

/** @param {DisagreementsPayload} data @param {State} state */
const makeParts = (data, state) => {
  const { groups, row } = data;
  const rows = rowsOfGroups(groups, row);
  /** @type {number[]} */
  let order = [];
  const listed = () => (rows[state.get("group")] ?? []).slice(0, MOST_PLACES);
  const chooseGroup = (/** @type {number} */ at) => {
    state.set("group", order[at]);
    if (!listed().includes(state.get("selected"))) state.set("selected", listed()[0]);
  };
  const choosePlace = (/** @type {number} */ at) => state.set("selected", listed()[at]);
  const list = walkedList(
    "opd-groups",
    "Groups of disagreements",
    () => order.indexOf(state.get("group")),
    chooseGroup,
  );
  const places = walkedList(
    "opd-places",
    "Places of the group in their texts",
    () => listed().indexOf(state.get("selected")),
    choosePlace,
  );
  list.node.addEventListener("click", (event) => {
    const i = rowOfEvent(event);
    if (i >= 0) chooseGroup(order.indexOf(i));
  });
  places.node.addEventListener("click", (event) => {
    const at = listed().indexOf(rowOfEvent(event));
    if (at >= 0) choosePlace(at);
  });
  const most = Math.max(0, ...groups.map(({ share }) => share));
  const drawGroups = () => {
    order = orderOfGroups(groups, state.get("by"));
    list.node.replaceChildren(...order.map((i) => groupLine(groups[i], i, most)));
    list.mark();
  };
  const heading = make("div", "opd-heading");
  const lineOfRow = placeLines(data);
  const drawPlaces = () => {
    const all = rows[state.get("group")] ?? [];
    places.node.replaceChildren(...listed().map(lineOfRow));
    const cut = all.length > MOST_PLACES ? `; the first ${MOST_PLACES} are listed` : "";
    const group = groups[state.get("group")];
    heading.textContent = group
      ? `${group.student} → ${group.teacher}: ${all.length} places in ${group.completions} completions${cut}`
      : "no place";
    places.mark();
  };
  const groupOfRow = (/** @type {number} */ at) => rows.findIndex((one) => one.includes(at));
  return { list, places, heading, drawGroups, drawPlaces, groupOfRow };
};

/** @param {DisagreementsPayload} data @param {State} state */
const orderButtons = ({ amount }, state) => {
  const node = put(make("div", "opd-buttons"), { role: "group", "aria-label": "Order" });
  const made = [
    ["share", `by share of ${amount === "kl" ? "KL" : amount}`],
    ["count", "by count"],
  ].map(([by, words]) => {
    const button = makeButton("", words);
    button.addEventListener("click", () => state.set("by", by));
    node.append(button);
    return { by, button };
  });
  const press = () => {
    for (const { by, button } of made) put(button, { "aria-pressed": state.get("by") === by });
  };
  return { node, press };
};

define("disagreements", ({ box, data, state }) => {
  const parts = makeParts(data, state);
  const buttons = orderButtons(data, state);
  const left = data.left ? `; ${data.left} smaller groups are left out` : "";
  const said = `${data.places} of ${data.text.index.length} tokens, ${data.groups.length + data.left} groups${left}`;
  const both = make("div", "opd-both");
  const groups = make("div");
  groups.append(make("div", "opd-heading", `the student wrote → ${data.teacher} wanted`));
  groups.append(parts.list.node);
  const places = make("div");
  places.append(parts.heading, parts.places.node);
  both.append(groups, places);
  const spoken = liveRegion();
  box.append(...titleOf(data), makeBar(buttons.node, make("span", "opd-soft", said)), both, spoken);

  state.on("by", () => {
    buttons.press();
    parts.drawGroups();
  });
  state.on("group", () => {
    parts.list.mark();
    parts.drawPlaces();
    spoken.textContent = parts.heading.textContent;
  });
  state.on("selected", (row) => {
    // A token chosen in another view shows its group.
    const group = completionAt(data.text, row) ? parts.groupOfRow(row) : -1;
    if (group >= 0) state.set("group", group);
    parts.places.mark();
  });
  buttons.press();
  parts.drawGroups();
  parts.drawPlaces();
});
