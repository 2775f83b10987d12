// What stands around the scatter of Regimes: choosers, groups, quadrants, and the list of the
// region's tokens in their texts.

/** @import { Group, RegimesPayload, State } from "./types.js" */
/** @import { Choice } from "./regimes_model.js" */

import {
  clamp,
  drawGlyph,
  isModified,
  make,
  makeButton,
  number,
  percent,
  put,
  rowOfEvent,
  unique,
} from "./core.js";
import { contextOf, groupLooks, lineOf, quadrantSums, totalsOf } from "./regimes_model.js";
import { sprite } from "./regimes_plot.js";

const MOST_LISTED = 60;
const HINT = "Drag over points, or press a quadrant’s name, to read its tokens in their texts.";

// ── Choosers and groups ──────────────────────────────────────────────────────────────────────────

/**
 * @param {"x" | "y" | "by"} trait
 * @param {string[][]} options key and name of each
 * @param {string} label
 * @param {State} state
 */
const chooser = (trait, options, label, state) => {
  const node = make("label", "opd-choose", label);
  const select = put(make("select"), { "data-axis": trait });
  for (const [key, name] of options) {
    select.append(put(make("option", "", name), { value: key }));
  }
  select.addEventListener("change", () => state.set(trait, select.value));
  node.append(select);
  return { node, select };
};

/** @param {RegimesPayload} data @param {State} state */
export const makeChoosers = ({ axes, sorts }, state) => {
  const node = make("div", "opd-choosers");
  const named = axes.map(({ key, label }) => [key, label]);
  const groups = sorts.map(({ key }) => [key, key.replaceAll("_", " ")]);
  const y = chooser("y", named, "up", state);
  const x = chooser("x", named, "across", state);
  const by = chooser("by", [["", "nothing"], ...groups], "sorted by", state);
  node.append(y.node, x.node, ...(sorts.length ? [by.node] : []));
  /** @param {Choice} choice */
  const show = (choice) => {
    y.select.value = choice.y.key;
    x.select.value = choice.x.key;
    by.select.value = choice.sort?.key ?? "";
  };
  return { node, show };
};

/**
 * Make the groups with their shapes and sizes; pressing one hides or shows it.
 * @param {RegimesPayload} data
 * @param {State} state
 */
export const groupChips = ({ sorts }, state) => {
  const node = put(make("div", "opd-chips"), {
    role: "group",
    "aria-label": "Groups; press to hide or show",
  });
  /** @param {string} name */
  const toggle = (name) => {
    const hidden = state.get("hidden");
    const isHidden = hidden.includes(name);
    state.set("hidden", isHidden ? hidden.filter((other) => other !== name) : [...hidden, name]);
  };
  const draw = () => {
    const sort = sorts.find(({ key }) => key === state.get("by"));
    const looks = groupLooks(sort);
    const counts = (sort?.names ?? []).map(() => 0);
    for (const group of sort?.index ?? []) counts[group] += 1;
    const chips = (sort?.names ?? []).map((name, i) => {
      const chip = put(makeButton("opd-chip"), {
        "aria-pressed": !state.get("hidden").includes(name),
        "data-name": name,
      });
      const mark = put(sprite(looks[i], 2), { "aria-hidden": "true" });
      const count = make("span", "opd-soft", counts[i].toLocaleString("en"));
      chip.append(mark, make("span", "", name), count);
      chip.addEventListener("click", () => toggle(name));
      return chip;
    });
    node.replaceChildren(...chips);
  };
  return { node, draw };
};

// ── Quadrants ────────────────────────────────────────────────────────────────────────────────────

/** @param {string} name */
const shareLine = (name) => {
  const line = make("div", "opd-share");
  const track = make("span", "opd-track");
  const fill = track.appendChild(make("span", "opd-fill"));
  const value = make("span", "opd-value");
  line.append(make("span", "opd-name", name === "kl" ? "KL" : name), track, value);
  return { line, fill, value };
};

/**
 * Make the table of quadrants: the share of tokens, and of every amount, in each.
 * @param {RegimesPayload} data
 * @param {State} state
 * @param {(quadrant: number) => void} choose
 */
export const quadrantTable = ({ text, amounts }, state, choose) => {
  const node = make("div", "opd-quadrants");
  const note = make("div", "opd-soft opd-note");
  const quadrants = Array.from({ length: 4 }, (_, i) => {
    const cell = make("div", "opd-quadrant");
    const title = makeButton("");
    title.addEventListener("click", () => choose(i));
    const shares = ["tokens", ...Object.keys(amounts)].map(shareLine);
    cell.append(title, ...shares.map(({ line }) => line));
    node.append(cell);
    return { title, shares };
  });
  /** @param {number} count */
  const noteOf = (count) => {
    const size = text.index.length;
    const words = [`${count.toLocaleString("en")} of ${size.toLocaleString("en")} tokens`];
    const isHiding = state.get("hidden").length > 0;
    if (count < size)
      words.push(`the others ${isHiding ? "are hidden or " : ""}have no value here`);
    return [...words, "bars beside the points: √ of counts"].join(" · ");
  };
  /** @param {Choice} choice */
  const draw = (choice) => {
    const { x, y } = choice;
    const sums = quadrantSums(choice, lineOf(x, state), lineOf(y, state), amounts);
    const totals = totalsOf(sums);
    const wordsX = [x.less || `${x.label} low`, x.more || `${x.label} high`];
    const wordsY = [y.less || `${y.label} low`, y.more || `${y.label} high`];
    quadrants.forEach(({ title, shares }, i) => {
      title.textContent = `${wordsY[i < 2 ? 1 : 0]} · ${wordsX[i % 2]}`;
      shares.forEach(({ fill, value }, k) => {
        const share = totals[k] ? sums[i][k] / totals[k] : 0;
        fill.style.width = `${100 * share}%`;
        value.textContent = percent(share);
      });
    });
    note.textContent = noteOf(totals[0]);
  };
  return { node, note, draw };
};

// ── The list ─────────────────────────────────────────────────────────────────────────────────────

/** @param {string} look @param {Group[]} groups */
export const glyphCell = (look, groups) => {
  const cell = put(make("span", look), { dir: "auto" });
  const holder = cell.appendChild(make("span"));
  for (const { glyph } of groups) drawGlyph(glyph, holder);
  return cell;
};

/**
 * Return the function that makes the line of a row: its place, its text, its group and numbers.
 * @param {RegimesPayload} data
 */
const listLines = ({ text }) => {
  const inContext = contextOf(text);
  /** @param {number} row @param {Choice} choice */
  return (row, { x, y, sort }) => {
    const { completion, before, here, after } = inContext(row);
    const place = `${completion.sample}:${row - completion.first}`;
    const valueX = number(x.values[row], x.ends[0] < 0);
    const valueY = number(y.values[row], y.ends[0] < 0);
    const line = put(make("div", "opd-kwic-line"), {
      role: "option",
      "aria-selected": "false",
      "data-row": row,
      id: unique(),
    });
    line.append(
      make("span", "opd-soft", place),
      glyphCell("opd-before", before),
      glyphCell("opd-kwic-here", [here]),
      glyphCell("opd-after", after),
      make("span", "opd-soft opd-which", sort ? sort.names[sort.index[row]] : ""),
      make("span", "opd-number", `${valueX}, ${valueY}`),
    );
    return line;
  };
};

/** @param {HTMLElement} node @param {State} state @param {() => number[]} rows */
const listenToList = (node, state, rows) => {
  node.addEventListener("keydown", (event) => {
    const at = rows().indexOf(state.get("selected"));
    const last = rows().length - 1;
    /** @type {Record<string, number>} */
    const steps = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: last };
    const to = steps[event.key];
    if (to === undefined || isModified(event)) return;
    event.preventDefault();
    state.set("selected", rows()[clamp(to, 0, last)]);
  });
  node.addEventListener("click", (event) => {
    const row = rowOfEvent(event);
    if (row >= 0) state.set("selected", row);
  });
};

/**
 * Make the list of a region's tokens, the largest first, each in its text.
 * @param {RegimesPayload} data
 * @param {State} state
 */
export const tokenList = (data, state) => {
  const { amounts } = data;
  const head = make("div", "opd-kwic-head opd-soft");
  const node = put(make("div", "opd-kwic"), {
    role: "listbox",
    tabindex: "0",
    "aria-label": "Tokens of the region in their texts",
  });
  const lineOfRow = listLines(data);
  /** @type {number[]} */
  let listed = [];
  /** @param {number[] | null} rows of the region; null without region @param {Choice} choice */
  const draw = (rows, choice) => {
    const sizes = amounts.kl ?? choice.x.values.map(Math.abs);
    listed = [...(rows ?? [])].sort((a, b) => sizes[b] - sizes[a]).slice(0, MOST_LISTED);
    node.replaceChildren(...listed.map((row) => lineOfRow(row, choice)));
    node.hidden = !listed.length;
    const count = rows?.length ?? 0;
    const largest = `the ${listed.length} of largest ${amounts.kl ? "KL" : choice.x.label}`;
    const cut = count > listed.length ? `; ${largest} are listed` : "";
    head.textContent = rows ? `${count.toLocaleString("en")} tokens in the region${cut}` : HINT;
  };
  const mark = () => {
    const at = listed.indexOf(state.get("selected"));
    [...node.children].forEach((line, i) => put(line, { "aria-selected": i === at }));
    const line = node.children[at];
    if (!line) {
      node.removeAttribute("aria-activedescendant");
      return;
    }
    put(node, { "aria-activedescendant": line.id });
    line.scrollIntoView({ block: "nearest", behavior: "instant" });
  };
  listenToList(node, state, () => listed);
  return { head, node, draw, mark, rows: () => listed };
};
