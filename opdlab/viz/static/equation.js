// Equation: the loss of the chosen token as its formula, the formula with numbers, the numbers that
// went in, and the gradient on the candidates, before and after the softmax.

/** @import { EquationPayload, FormulaPart } from "./types.js" */

import {
  define,
  drawLegend,
  liveRegion,
  make,
  makeBar,
  measure,
  moveCursor,
  number,
  percent,
  promptBox,
  put,
  titleOf,
  wordAt,
} from "./core.js";
import { duelIndex } from "./duel.js";
import { mapOfLong } from "./minimap.js";
import { tokenStrip } from "./strip.js";

// ── Model: a formula as text ─────────────────────────────────────────────────────────────────────

/** @type {Record<string, number>} */
const STRENGTH = { "+": 2, "-": 2, "*": 3, "/": 3, neg: 4 };
const COMPARISONS = [">", ">=", "<", "<=", "==", "!="];
/** @type {Record<string, string>} */
const SIGNS = { "+": " + ", "-": " − ", "*": " · ", "/": " / ", ">=": " ≥ ", "<=": " ≤ " };
const MOST_TERMS = 3; // of a sum that are written out
const CLOSE = 2e-3; // how far two numbers of three digits may be apart, relative to their size

/**
 * Return a number with three digits; one near zero keeps its size, as in 1.7e−5.
 * @param {number} value
 * @param {boolean} [signed]
 */
export const exactNumber = (value, signed = false) => {
  const isSmall = value !== 0 && Math.abs(value) < 0.0005;
  if (!isSmall) return number(value, signed);
  return (signed && value > 0 ? "+" : "") + value.toExponential(1).replaceAll("-", "−");
};

/** @param {FormulaPart} part */
const strengthOf = ([kind]) => STRENGTH[kind] ?? (COMPARISONS.includes(kind) ? 1 : 9);

/**
 * Write a formula as text; `nameOf` says what stands for a name. `termsOf` writes the term of a sum
 * for each token that is shown; without it, a sum stands as it is.
 * @param {FormulaPart} part
 * @param {(name: string) => string} nameOf
 * @param {((term: FormulaPart) => string[]) | null} [termsOf]
 * @returns {string}
 */
export const writeFormula = (part, nameOf, termsOf = null) => {
  const [kind, ...rest] = part;
  if (kind === "name") return nameOf(String(rest[0]));
  if (kind === "number") return exactNumber(Number(rest[0]));
  const inner = /** @type {FormulaPart[]} */ (rest);
  const terms = kind === "sum" && termsOf ? termsOf(inner[0]) : [];
  if (terms.length) return `[${[...terms, "…"].join(" + ")}]`;
  const texts = inner.map((one) => writeFormula(one, nameOf, termsOf));
  const own = strengthOf(part);
  const held = texts.map((text, i) => {
    const strength = strengthOf(inner[i]);
    // a − (b − c) and a / (b · c) keep their brackets.
    const isRight = i === 1 && (kind === "-" || kind === "/") && strength === own;
    const isNegative = text.startsWith("−") && (i === 1 || kind === "neg");
    return own < 9 && (strength < own || isRight || isNegative) ? `(${text})` : text;
  });
  if (kind === "neg") return `−${held[0]}`;
  if (own < 9) return held.join(SIGNS[kind] ?? ` ${kind} `);
  return kind === "sum" ? `Σ [${texts[0]}]` : `${kind}(${texts.join(", ")})`;
};

/**
 * Return the names that a formula reads, outside of sums and inside.
 * @param {FormulaPart} part
 * @returns {string[]}
 */
export const namesOf = ([kind, ...rest]) => {
  if (kind === "name") return [String(rest[0])];
  if (kind === "number" || kind === undefined) return [];
  return [.../** @type {FormulaPart[]} */ (rest)].flatMap(namesOf);
};

/** @type {Record<string, (a: number, b: number) => boolean>} */
const HOLDS = {
  ">": (a, b) => a > b,
  ">=": (a, b) => a >= b,
  "<": (a, b) => a < b,
  "<=": (a, b) => a <= b,
  "==": (a, b) => a === b,
  "!=": (a, b) => a !== b,
};

/**
 * Return a formula with that branch only of each `where` which a token takes.
 * @param {FormulaPart} part
 * @param {(name: string) => number} valueOf NaN for a name without a number; both branches stay then
 * @returns {FormulaPart}
 */
export const takenBranches = (part, valueOf) => {
  const [kind, ...rest] = part;
  if (kind === "name" || kind === "number") return part;
  const inner = /** @type {FormulaPart[]} */ (rest);
  if (kind === "where") {
    const [sign, ...sides] = inner[0];
    const [a, b] = /** @type {FormulaPart[]} */ (sides).map((side) => {
      if (side[0] === "number") return Number(side[1]);
      return side[0] === "name" ? valueOf(String(side[1])) : NaN;
    });
    const isKnown = String(sign) in HOLDS && !Number.isNaN(a) && !Number.isNaN(b);
    if (isKnown) return takenBranches(inner[HOLDS[String(sign)](a, b) ? 1 : 2], valueOf);
  }
  return [kind, ...inner.map((one) => takenBranches(one, valueOf))];
};

/** @param {number} left @param {number} right */
export const isClose = (left, right) =>
  Math.abs(left - right) <= CLOSE * Math.max(1, Math.abs(left), Math.abs(right));

/**
 * Say how the formula's value and the recorded loss go together; "" where one of them is missing.
 * @param {number} value
 * @param {number} recorded
 * @param {boolean} isSum sums over the kept tokens alone read as lower bounds
 */
export const agreementText = (value, recorded, isSum) => {
  if (Number.isNaN(value) || Number.isNaN(recorded)) return "";
  if (isClose(value, recorded)) return "as recorded";
  const said = `recorded: ${number(recorded, true)}`;
  return isSum ? `${said}; sums here run over the kept tokens` : `${said}: not the same`;
};

// ── Parts ────────────────────────────────────────────────────────────────────────────────────────

/** @param {string} head */
const textLine = (head) => {
  const node = make("div", "opd-line");
  const math = make("div", "opd-math");
  node.append(make("span", "opd-soft", head), math);
  return { node, math };
};

/**
 * Return the function that writes a sum's term for the likeliest candidates of a row.
 * @param {EquationPayload} data
 */
const sumTerms = ({ duel }) => {
  const index = duel && duelIndex(duel);
  /** @param {FormulaPart} term @param {number} row @param {(name: string) => string} at */
  return (term, row, at) => {
    if (!duel || !index) return [];
    const size = Math.min(duel.count[row], MOST_TERMS);
    return Array.from({ length: size }, (_, k) => {
      const place = index.start[row] + k;
      return writeFormula(term, (name) => {
        const known = duel.p[name] ?? duel.beside?.[name];
        return known ? exactNumber(known[place]) : at(name);
      });
    });
  };
};

/** @param {EquationPayload} data */
const formulaLines = (data) => {
  const { tree, channels, values, policies } = data;
  const node = make("div", "opd-lines");
  const general = `L(${channels
    .filter(({ key }) => key.endsWith("_logp") || key === "log_ratio")
    .map(({ key }) => key)
    .join(", ")}, …)`;
  const known = tree.length > 0;
  const symbols = textLine("loss =");
  const filled = textLine("here");
  const result = textLine("result");
  symbols.math.textContent = known ? writeFormula(tree, (name) => name) : general;
  filled.node.hidden = !known;
  node.append(symbols.node, filled.node, result.node);
  const byKey = new Map(channels.map((channel) => [channel.key, channel]));
  const loss = byKey.get("loss");
  const isSum = namesOf(tree).some((name) => policies.includes(name));
  const termsAt = sumTerms(data);
  /** @param {number} row */
  const show = (row) => {
    const at = (/** @type {string} */ name) => {
      const channel = byKey.get(name);
      return channel ? exactNumber(channel.values[row]) : name;
    };
    const termsOf = (/** @type {FormulaPart} */ term) => termsAt(term, row, at);
    const numberOf = (/** @type {string} */ name) => byKey.get(name)?.values[row] ?? NaN;
    filled.math.textContent = known ? writeFormula(takenBranches(tree, numberOf), at, termsOf) : "";
    const recorded = loss ? loss.values[row] : NaN;
    const value = values[row];
    const shown = Number.isNaN(value) ? recorded : value;
    result.math.textContent = Number.isNaN(shown)
      ? "not kept in this trace"
      : exactNumber(shown, true);
    const said = agreementText(value, recorded, isSum);
    if (said) result.math.append(make("span", "opd-soft", `   ${said}`));
  };
  return { node, show };
};

/** @param {EquationPayload} data */
const inputList = ({ channels, tree }) => {
  const node = make("div");
  node.append(make("div", "opd-heading", "what went in, and what came out"));
  const read = new Set(namesOf(tree));
  const lines = channels.map((channel) => {
    const isRead = read.has(channel.key);
    const line = make("div", channel.minor && !isRead ? "opd-input opd-minor" : "opd-input");
    const name = make("span", "opd-name", channel.label);
    name.title = channel.formula ?? "";
    const value = make("span", "opd-value");
    line.toggleAttribute("data-read", isRead);
    put(line, { "data-channel": channel.key }).append(name, value);
    return { line, value, channel };
  });
  node.append(...lines.map(({ line }) => line));
  /** @param {number} row */
  const show = (row) => {
    for (const { value, channel } of lines) {
      value.textContent = measure(channel.values[row], channel);
    }
  };
  return { node, show };
};

const slopeRow = () => {
  const node = make("div", "opd-slope");
  const word = make("span", "opd-word");
  const share = make("span", "opd-value");
  const sides = [0, 1].map(() => {
    const track = make("span", "opd-track");
    const fill = track.appendChild(make("span", "opd-fill"));
    return { track, fill, value: make("span", "opd-value") };
  });
  node.append(word, share, ...sides.flatMap(({ track, value }) => [track, value]));
  /** @param {string} name @param {number} p @param {number[]} slopes @param {number[]} most */
  const fill = (name, p, slopes, most) => {
    word.textContent = name;
    share.textContent = percent(p);
    sides.forEach((side, i) => {
      const size = most[i] ? Math.abs(slopes[i]) / most[i] : 0;
      side.fill.style.width = `${50 * size}%`;
      side.fill.style.left = slopes[i] < 0 ? `${50 - 50 * size}%` : "50%";
      put(side.fill, { "data-sign": Math.sign(slopes[i]) });
      side.value.textContent = exactNumber(slopes[i], true);
    });
  };
  return { node, fill };
};

const ORDER = ["logp_gradient", "logit_gradient"];

/**
 * The gradient of the loss on every candidate of the chosen token.
 * @param {EquationPayload} data
 */
const gradientTable = ({ duel, text }) => {
  const node = make("div", "opd-gradients");
  const heading = "slope of the loss on each token; a step goes against it";
  node.append(make("div", "opd-heading", heading));
  const { beside, beside_other: besideOther } = duel ?? {};
  if (!duel || !beside || !besideOther || !ORDER.some((name) => name in beside)) {
    const advice =
      "Not kept. Runs with trace_k=8 keep it; viz.Equation(trace, method=…) computes it.";
    node.append(make("div", "opd-soft", advice));
    return { node, show: () => {} };
  }
  const head = make("div", "opd-slope opd-soft");
  for (const words of ["token", "student", "after the softmax", "", "before it (logits)", ""]) {
    head.append(make("span", "", words));
  }
  const rows = Array.from({ length: Math.max(0, ...duel.count) + 1 }, slopeRow);
  node.append(head, ...rows.map((row) => row.node));
  const index = duelIndex(duel);
  /** @param {number} i */
  const show = (i) => {
    const count = duel.count[i];
    const start = index.start[i];
    const slopesAt = (/** @type {number} */ at) => ORDER.map((name) => beside[name]?.[at] ?? NaN);
    const rest = ORDER.map((name) => besideOther[name]?.[index.place[i]] ?? NaN);
    const all = [...Array.from({ length: count }, (_, k) => slopesAt(start + k)), rest];
    const most = ORDER.map((_, side) => Math.max(...all.map((one) => Math.abs(one[side]) || 0)));
    const sampled = text.id[text.index[i]];
    rows.forEach(({ node: line, fill }, k) => {
      line.classList.toggle("opd-empty", k > count || !count);
      if (k > count || !count) return;
      const isLast = k === count;
      const id = duel.ids[duel.row[start + k]];
      line.toggleAttribute("data-sampled", !isLast && id === sampled);
      const p = isLast ? duel.other.student[index.place[i]] : duel.p.student[start + k];
      fill(isLast ? "all others" : duel.names[duel.row[start + k]], p, all[k], most);
    });
  };
  return { node, show };
};

define("equation", ({ box, data, state }) => {
  const shown = data.channels.find(({ key }) => key === data.shown) ?? data.channels[0];
  const strip = tokenStrip({ text: data.text, finish: data.finish, state });
  const map = mapOfLong(strip, []);
  const legend = make("div");
  const lines = formulaLines(data);
  const inputs = inputList(data);
  const gradients = gradientTable(data);
  const spoken = liveRegion();
  const both = make("div", "opd-both");
  both.append(inputs.node, gradients.node);
  const place = make("span");
  box.append(...titleOf(data), promptBox(data.prompt), makeBar(place, legend));
  box.append(...(map ? [map.node] : []), strip.node, lines.node, both, spoken);
  strip.paint(shown);
  drawLegend(legend, shown);
  const drawMap = () =>
    map?.draw([shown], { peaks: shown.peaks, found: [], chosen: state.get("selected") });

  /** @param {number} row */
  const look = (row) => {
    if (row < 0 || row >= strip.size) return;
    const name = data.method ? `${data.method}, ` : "";
    place.textContent = `${name}${wordAt(data.text, row)} at position ${row}`;
    lines.show(row);
    inputs.show(row);
    gradients.show(row);
    moveCursor(legend, shown, shown.values[row]);
  };
  if (strip.size && state.get("selected") < 0) state.set("selected", 0);
  state.on("selected", (row) => {
    look(row);
    map?.mark(row);
    if (row >= 0 && row < strip.size) {
      spoken.textContent = `${place.textContent}, ${shown.label} ${measure(shown.values[row], shown)}`;
    }
  });
  state.on("hovered", (row) => look(row < 0 ? state.get("selected") : row));
  look(state.get("selected"));
  drawMap();
  return map?.close;
});
