// PrivilegeLens: the gap of each token as its colour and, in rows under the text, its parts:
// information and capability.

/** @import { Channel, PrivilegePayload, Split, State } from "./types.js" */

import {
  arrowOf,
  clamp,
  define,
  drawLegend,
  liveRegion,
  make,
  makeBar,
  moveCursor,
  number,
  percent,
  promptBox,
  put,
  sumOfNumbers,
  titleOf,
  wordAt,
} from "./core.js";
import { mapOfLong } from "./minimap.js";
import { tokenStrip } from "./strip.js";
import { laneKey, paintTracks } from "./tracks.js";

const SIDES = ["student", "plain", "informed", "wrong"];

// ── Model ────────────────────────────────────────────────────────────────────────────────────────

/**
 * Tell whether a token is a leak: the hint decides (information outweighs capability), and without
 * it the teacher is undecided.
 * @param {Split} split
 * @param {number} i
 * @param {{ least: number, undecided: number }} levels nats that count; entropy of the undecided
 */
export const isLeak = (split, i, { least, undecided }) =>
  Math.abs(split.information[i]) > Math.max(Math.abs(split.capability[i]), least) &&
  split.entropy[i] > undecided;

/**
 * Return what a token's split says, in words.
 * @param {Split} split
 * @param {number} row
 * @param {{ least: number, undecided: number }} levels
 */
export const verdictOf = (split, row, levels) => {
  if (isLeak(split, row, levels)) {
    return "⚑ leak: the hint decides, and without it the teacher is undecided";
  }
  const information = Math.abs(split.information[row]);
  const capability = Math.abs(split.capability[row]);
  if (Math.max(information, capability) <= levels.least) return "nobody knows better";
  if (information <= capability) return "capability: the teacher knows this without the hint";
  return split.entropy.length
    ? "information, but the teacher is decided without it as well"
    : "information outweighs capability";
};

/** @param {number} value */
const signed = (value) => number(value, true) + arrowOf(value);

// For a table: two decimals.
/** @param {number} value */
const short = (value) => {
  if (!Number.isFinite(value)) return number(value);
  if (Math.abs(value) < 0.005) return "0";
  return `${value > 0 ? "+" : "−"}${Math.abs(value).toFixed(2)}`;
};

/** @param {number} value */
const ownerOf = (value) => (value > 0 ? "opd-of-teacher" : "opd-of-student");

/** @param {PrivilegePayload} data @param {string} key */
const channelOf = ({ channels }, key) => {
  const found = channels.find((channel) => channel.key === key);
  if (!found) throw new Error(`The page lacks the channel ${key}.`);
  return found;
};

// ── Parts ────────────────────────────────────────────────────────────────────────────────────────

/**
 * Make a bar between two places of a track, 0 to 1.
 * @param {number} from
 * @param {number} to
 * @param {string} look
 */
const spanBar = (from, to, look) => {
  const track = make("span", "opd-track opd-between");
  const fill = track.appendChild(make("span", `opd-fill ${look}`));
  fill.style.left = `${100 * Math.min(from, to)}%`;
  fill.style.width = `${100 * Math.abs(to - from)}%`;
  return track;
};

/**
 * Append cells to a row: [class, words] or nodes.
 * @template {HTMLElement} Row
 * @param {Row} row
 * @param {(Node | [look: string, words: string])[]} cells
 */
const withCells = (row, cells) => {
  for (const cell of cells) row.append(Array.isArray(cell) ? make("span", ...cell) : cell);
  return row;
};

/**
 * Draw the way from the log-prob of the whole text under the student to that under the hinted
 * teacher.
 * @param {PrivilegePayload} data
 */
const waterfall = (data) => {
  const { sides, logp } = data;
  const node = make("div", "opd-fall");
  const sums = Object.entries(logp).map(([side, values]) => [side, sumOfNumbers(values)]);
  /** @type {Record<string, number>} */
  const totals = Object.fromEntries(sums);
  const low = Math.min(-1e-9, ...Object.values(totals).filter(Number.isFinite));
  const scale = (/** @type {number} */ value) => clamp(1 - value / low, 0, 1);
  /** @param {string} side */
  const totalRow = (side) => {
    const total = totals[side];
    const bar = spanBar(scale(0), scale(total), "opd-total");
    const cells = /** @type {[string, string][]} */ ([
      ["opd-name", sides[side]],
      ["opd-value", number(total)],
    ]);
    node.append(withCells(make("div", "opd-fall-row opd-total"), [cells[0], bar, cells[1]]));
  };
  /** @param {string} name @param {string} key @param {string} from @param {string} to */
  const stepRow = (name, key, from, to) => {
    const value = sumOfNumbers(channelOf(data, key).values);
    const look = `opd-step ${ownerOf(value)}`;
    const bar = spanBar(scale(totals[from]), scale(totals[to]), look);
    const row = make("div", `opd-fall-row ${look}`);
    node.append(withCells(row, [["opd-name", name], bar, ["opd-value", signed(value)]]));
  };
  node.append(make("div", "opd-heading", "log-prob of the whole text, nats"));
  totalRow("student");
  stepRow("+ capability", "capability", "student", "plain");
  totalRow("plain");
  stepRow("+ information", "information", "plain", "informed");
  totalRow("informed");
  if (logp.wrong) stepRow("wrong hint instead", "wrong", "plain", "wrong");
  return node;
};

/**
 * Return the rows of the table of types: name, tokens and mean of each part.
 * @param {PrivilegePayload} data
 * @param {("information" | "capability" | "wrong")[]} parts
 */
const meansByType = ({ all }, parts) => {
  const everyRow = [...all.gap.keys()];
  const groups = all.names.map((name, k) => ({
    name,
    rows: everyRow.filter((i) => all.type[i] === k),
  }));
  return [{ name: "all", rows: everyRow }, ...groups].map(({ name, rows }) => {
    const means = parts.map((part) => {
      const known = rows.map((i) => all[part]?.[i] ?? NaN).filter((value) => !Number.isNaN(value));
      return sumOfNumbers(known) / known.length;
    });
    return { name, rows, means };
  });
};

/**
 * Make the table of means by type over the whole trace; `draw` fills the share of flagged tokens.
 * @param {PrivilegePayload} data
 */
const typeTable = (data) => {
  const node = make("div", "opd-types");
  /** @type {("information" | "capability" | "wrong")[]} */
  const parts = ["information", "capability"];
  if (data.all.wrong) parts.push("wrong");
  const types = meansByType(data, parts);
  const sizes = types.flatMap(({ means }) => means.map(Math.abs).filter(Number.isFinite));
  const top = Math.max(...sizes, 0.1);
  /** @param {number} value */
  const place = (value) => {
    if (short(value) === "0") return 0.5;
    return clamp(0.5 + (Math.sign(value) * Math.sqrt(Math.abs(value) / top)) / 2, 0, 1);
  };
  node.style.setProperty("--parts", String(parts.length));
  const heading = make("div", "opd-heading", "mean by type of token, all completions, nats");
  const titles = parts.map((part) => (part === "wrong" ? "wrong hint" : part));
  const head = withCells(make("div", "opd-type opd-soft"), [
    ["", "type"],
    ["opd-count", "tokens"],
    ...titles.map((title) => make("span", "opd-part-name", title)),
    ["opd-count", "flagged"],
  ]);
  node.append(heading, head);
  const shares = types.map(({ name, rows, means }) => {
    const flagged = make("span", "opd-count");
    const cells = means.map((value) => {
      const bar = spanBar(0.5, place(value), ownerOf(value));
      return withCells(make("span", "opd-mean"), [bar, ["opd-value", short(value)]]);
    });
    const row = put(make("div", "opd-type"), { "data-type": name });
    const count = make("span", "opd-count", rows.length.toLocaleString("en"));
    node.append(withCells(row, [["opd-type-name", name], count, ...cells, flagged]));
    return { rows, flagged };
  });
  /** @param {(i: number) => boolean} isFlagged */
  const draw = (isFlagged) => {
    for (const { rows, flagged } of shares) {
      flagged.textContent = percent(rows.filter(isFlagged).length / (rows.length || 1));
    }
  };
  return { node, draw };
};

/**
 * Make the panel of one token: what each policy gives it, and the sum that makes the gap.
 * @param {PrivilegePayload} data
 * @param {(row: number) => string} verdict
 */
const tokenPanel = (data, verdict) => {
  const { text, sides, logp, entropy, all } = data;
  const node = make("div", "opd-panel");
  const head = make("div", "opd-privilege-head");
  const bars = make("div", "opd-policies");
  const split = make("div", "opd-split");
  node.append(head, bars, split);
  /** @param {string} side @param {number} row */
  const policyRow = (side, row) => {
    const share = Math.exp(logp[side][row]);
    const look = side === "student" ? "opd-of-student" : "opd-of-teacher";
    return withCells(make("div", "opd-policy"), [
      ["opd-name", sides[side]],
      spanBar(0, share, look),
      ["opd-value", percent(share)],
      ["opd-soft opd-value", `log p ${number(logp[side][row])}`],
      ["opd-soft opd-value", entropy[side] ? `H ${entropy[side][row].toFixed(2)}` : ""],
    ]);
  };
  /** @param {Channel} channel @param {number} row */
  const fact = (channel, row) =>
    withCells(put(make("span", "opd-fact"), { "data-channel": channel.key }), [
      ["opd-name", channel.label],
      ["opd-value", signed(channel.values[row])],
    ]);
  const sign = (/** @type {string} */ words) => make("span", "opd-equation-sign", words);
  const wrong = data.channels.find(({ key }) => key === "wrong");
  const [gap, information, capability] = ["gap", "information", "capability"].map((key) =>
    channelOf(data, key),
  );
  /** @param {number} row */
  const show = (row) => {
    const type = all.names.length ? ` · ${all.names[all.type[data.start + row]]}` : "";
    head.replaceChildren(
      make("span", "opd-word", wordAt(text, row)),
      make("span", "opd-soft", `sampled at position ${row}${type}`),
      make("b", "opd-verdict", verdict(row)),
    );
    const policies = SIDES.filter((side) => side in sides);
    bars.replaceChildren(...policies.map((side) => policyRow(side, row)));
    split.replaceChildren(fact(gap, row), sign("="), fact(information, row), sign("+"));
    split.append(fact(capability, row), ...(wrong ? [fact(wrong, row)] : []));
  };
  return { node, show };
};

/**
 * Make the slider of the entropy from which the teacher counts as undecided.
 * @param {PrivilegePayload} data
 * @param {State} state
 */
const undecidedKnob = ({ all, sides }, state) => {
  const node = make("label", "opd-undecided");
  const told = make("output");
  const range = put(make("input"), {
    type: "range",
    min: 0,
    max: Math.max(2, ...[...all.entropy].filter(Number.isFinite)).toFixed(2),
    step: 0.01,
    "aria-label": "Entropy from which the teacher without the hint counts as undecided, nats",
  });
  range.addEventListener("input", () => state.set("undecided", Number(range.value)));
  const words = `⚑ where information outweighs capability and the entropy of ${sides.plain} is above`;
  node.append(make("span", "", words), range, told);
  /** @param {string} counted */
  const show = (counted) => {
    range.value = String(state.get("undecided"));
    told.textContent = `${number(state.get("undecided"))} nats: ${counted}`;
  };
  return { node, show };
};

// The lanes under the text. A bar that is too small to have a height is left out, or every token
// would have one.
/** @param {PrivilegePayload} data */
const lanesOf = ({ channels }) =>
  channels
    .filter(({ key }) => key !== "gap")
    .map((channel) => {
      const least = channel.limit / 64;
      const values = channel.values.map((value) => (Math.abs(value) < least ? 0 : value));
      return { ...channel, values };
    });

/** @param {PrivilegePayload} data @param {State} state */
const makeParts = (data, state) => {
  const gap = channelOf(data, "gap");
  const lanes = lanesOf(data);
  /** @type {Split} */
  const split = {
    information: channelOf(data, "information").values,
    capability: channelOf(data, "capability").values,
    entropy: data.entropy.plain ?? new Float32Array(),
  };
  const levels = () => ({ least: data.least, undecided: state.get("undecided") });
  const verdict = (/** @type {number} */ row) => verdictOf(split, row, levels());
  const strip = tokenStrip({ text: data.text, finish: data.finish, state });
  const map = mapOfLong(strip, data.segments);
  const legend = make("div");
  const key = laneKey("under the text, up is for the token and down against it:", lanes);
  if (data.entropy.plain) key.append(make("span", "", "⚑ leak"));
  drawLegend(legend, gap);
  strip.paint(gap);
  paintTracks(strip, lanes);
  const drawMap = () =>
    map?.draw([gap, ...lanes], { peaks: gap.peaks, found: [], chosen: state.get("selected") });
  const panel = tokenPanel(data, verdict);
  const types = typeTable(data);
  const knob = undecidedKnob(data, state);
  return { gap, split, levels, verdict, strip, map, drawMap, legend, key, panel, types, knob };
};

define("privilege", ({ box, data, state }) => {
  const { text, all } = data;
  const parts = makeParts(data, state);
  const { gap, split, strip, map, legend, panel, types, knob } = parts;
  const { size } = strip;
  const spoken = liveRegion();
  /** @param {number} row */
  const showToken = (row) => {
    if (row < 0 || row >= size) return;
    panel.show(row);
    moveCursor(legend, gap, gap.values[row]);
  };
  /** @param {number} row */
  const speak = (row) => {
    const information = `information ${number(split.information[row], true)}`;
    const capability = `capability ${number(split.capability[row], true)}`;
    const words = [`position ${row}`, wordAt(text, row), information, capability];
    spoken.textContent = [...words, parts.verdict(row)].join(", ");
  };
  const flag = () => {
    const leaks = split.information.map((_, row) => Number(isLeak(split, row, parts.levels())));
    for (const { ink, first, size: rows } of strip.glyphs) {
      const isMarked = leaks.subarray(first, first + rows).includes(1);
      ink.parentElement?.toggleAttribute("data-leak", isMarked);
    }
    types.draw((i) => isLeak(all, i, parts.levels()));
    knob.show(`${sumOfNumbers(leaks)} of ${size} tokens here`);
    showToken(state.get("hovered") < 0 ? state.get("selected") : state.get("hovered"));
  };

  const sums = make("div", "opd-sums");
  sums.append(waterfall(data), types.node);
  box.append(...titleOf(data), promptBox(data.prompt), makeBar(legend, parts.key));
  box.append(...(map ? [map.node] : []), strip.node, panel.node, sums);
  box.append(...(data.entropy.plain ? [knob.node] : []), spoken);
  state.on("selected", (row) => {
    showToken(row);
    map?.mark(row);
    if (row >= 0 && row < size) speak(row);
  });
  state.on("hovered", (row) => showToken(row < 0 ? state.get("selected") : row));
  state.on("undecided", flag);
  if (size && state.get("selected") < 0) state.set("selected", gap.peaks[0] ?? 0);
  flag();
  parts.drawMap();
  return map?.close;
});
