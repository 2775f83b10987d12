// Alignment: spans as cells of two rows; arrow keys walk them, the panel reads one.

/** @import { AlignedTokens, AlignmentPayload, State } from "./types.js" */

import {
  arrowOf,
  closest,
  define,
  isModified,
  make,
  makeBar,
  number,
  put,
  shape,
  sum,
  tintOf,
  titleOf,
  unique,
} from "./core.js";

const HINT =
  "Point at a span, or walk with the arrow keys; n and p go to the next that is not 1:1.";
const READ = 12; // tokens of a side that the panel shows

// ── Model ────────────────────────────────────────────────────────────────────────────────────────

/**
 * A span: tokens from … to of either side, its bytes, and whether both spell the same.
 * @typedef {object} Span
 * @property {[from: number, to: number]} ours
 * @property {[from: number, to: number]} theirs
 * @property {number} bytes
 * @property {boolean} isMatched
 * @property {string} kind "1:1", "2:3", "unmatched"
 */

/** @param {AlignmentPayload} data @returns {Span[]} */
const spansOf = ({ cuts }) =>
  Array.from({ length: cuts.length / 6 }, (_, i) => {
    const [from, to, theirFrom, theirTo, bytes, matched] = cuts.subarray(6 * i, 6 * i + 6);
    const kind = matched ? `${to - from}:${theirTo - theirFrom}` : "unmatched";
    return {
      ours: [from, to],
      theirs: [theirFrom, theirTo],
      bytes,
      isMatched: Boolean(matched),
      kind,
    };
  });

/**
 * Return of each token its centre in percent of the cell, and where its bytes begin and end as
 * shares of the span's.
 * @param {AlignedTokens} tokens
 * @param {[from: number, to: number]} range
 */
const placesOf = ({ wide, size }, [from, to]) => {
  const allWide = sum(wide.subarray(from, to)) || 1;
  const allBytes = sum(size.subarray(from, to)) || 1;
  let x = 0;
  let bytes = 0;
  const places = [];
  for (let i = from; i < to; i++) {
    const centre = (100 * (x + wide[i] / 2)) / allWide;
    places.push({ centre, start: bytes / allBytes, end: (bytes + size[i]) / allBytes });
    x += wide[i];
    bytes += size[i];
  }
  return places;
};

/**
 * Return a path of lines from each token above to each below that it shares bytes with.
 * @param {AlignmentPayload} data
 * @param {Span} span
 */
const jointsOf = ({ ours, theirs }, span) => {
  const below = placesOf(theirs, span.theirs);
  const lines = placesOf(ours, span.ours).flatMap((top) =>
    below
      .filter((foot) => Math.min(top.end, foot.end) - Math.max(top.start, foot.start) > 1e-9)
      .map((foot) => `M${top.centre.toFixed(1)} 0L${foot.centre.toFixed(1)} 20`),
  );
  return lines.join("");
};

/**
 * Return the words of some tokens; of more than `most`, the first and the last, with the rest
 * counted.
 * @param {AlignedTokens} tokens
 * @param {[from: number, to: number]} range
 * @param {number} most
 */
const wordsOf = ({ word, at }, [from, to], most) => {
  const words = (/** @type {number} */ a, /** @type {number} */ b) =>
    Array.from(at.subarray(a, b), (i) => word[i]);
  if (to - from <= most) return words(from, to);
  const half = Math.floor(most / 2);
  const rest = `… ${(to - from - 2 * half).toLocaleString("en")} more …`;
  return [...words(from, from + half), rest, ...words(to - half, to)];
};

// ── Drawing ──────────────────────────────────────────────────────────────────────────────────────

/**
 * @param {AlignedTokens} tokens
 * @param {[from: number, to: number]} range
 * @param {string} tint
 * @param {number} most tokens shown
 */
const drawSide = (tokens, [from, to], tint, most) => {
  const node = make("span", `opd-toks ${tint}`);
  const widths = [...tokens.wide.subarray(from, to)];
  const columns = widths.map((width) => `minmax(0, ${width}fr)`).join(" ") || "1fr";
  node.style.gridTemplateColumns = widths.length > most ? "1fr" : columns;
  for (const word of wordsOf(tokens, [from, to], most)) {
    node.append(make("span", word === "∅" ? "opd-silent" : "", word));
  }
  return { node, width: sum(widths) };
};

/** @param {AlignmentPayload} data @param {Span} span @param {number} i */
const drawSpan = (data, span, i) => {
  const { ours, theirs, full } = data;
  const { kind, isMatched } = span;
  const tint = tintOf(data.kl ? data.kl[i] : NaN, { kind: "ratio", limit: data.limit });
  const top = drawSide(ours, span.ours, tint, full);
  const foot = drawSide(theirs, span.theirs, tint, full);
  const width = Math.max(top.width, foot.width);
  const isLoose = !isMatched || width > data.long;
  const unmatched = isMatched ? "" : " opd-unmatched";
  const several = kind === "1:1" ? "" : " opd-several";
  const loose = isLoose ? " opd-loose" : "";
  const node = make("span", `opd-pair${unmatched}${several}${loose}`);
  const joints = shape("svg", {
    viewBox: "0 0 100 20",
    preserveAspectRatio: "none",
    "aria-hidden": "true",
  });
  joints.append(shape("path", { d: isLoose ? "" : jointsOf(data, span) }));
  node.style.minWidth = `min(${width}ch, 100%)`;
  node.append(top.node, joints, foot.node);
  const above = wordsOf(ours, span.ours, READ).join(" ");
  const below = wordsOf(theirs, span.theirs, READ).join(" ");
  return put(node, {
    role: "option",
    "aria-selected": "false",
    "data-span": i,
    "aria-label": `span ${i}, ${kind}: ${above} is ${below}`,
  });
};

/** @param {AlignmentPayload} data @param {Span[]} spans */
const spanPanel = (data, spans) => {
  const node = make("div", "opd-panel opd-align-facts");
  /** @param {string} name @param {string[]} words */
  const line = (name, words) => {
    const row = make("div");
    row.append(make("b", "", name), make("span", "opd-word", words.join(" ") || "∅"));
    return row;
  };
  /** @param {number} i */
  const show = (i) => {
    const span = spans[i];
    if (!span) {
      node.replaceChildren(make("div", "opd-soft", HINT));
      return;
    }
    const kl = data.kl ? data.kl[i] : NaN;
    const told = [`span ${i}`, span.kind, `${span.bytes} byte${span.bytes === 1 ? "" : "s"}`];
    if (!Number.isNaN(kl)) told.push(`log q − log p ${number(kl, true)} nats${arrowOf(kl)}`);
    node.replaceChildren(
      make("div", "", told.join(" · ")),
      line(data.names[0], wordsOf(data.ours, span.ours, READ)),
      line(data.names[1], wordsOf(data.theirs, span.theirs, READ)),
    );
  };
  return { node, show };
};

/** @param {AlignmentPayload} data */
const keyBar = ({ names: [mine, other], said, kl }) => {
  const keys = make("div", "opd-align-keys");
  const words = [`${mine} above, ${other} below`, "grey: one token each", "violet: several"];
  words.push("hatched: unmatched");
  if (kl) words.push("orange: student over-confident; blue: teacher wants more");
  keys.append(...words.map((one) => make("span", "", one)));
  return makeBar(make("b", "", said), keys);
};

// ── Input ────────────────────────────────────────────────────────────────────────────────────────

/**
 * Return where a key leads from span i; undefined for other keys.
 * @param {Span[]} spans
 * @param {string} key
 * @param {number} i
 */
export const stepFrom = (spans, key, i) => {
  const odd = [...spans.keys()].filter((k) => spans[k].kind !== "1:1");
  /** @type {Record<string, number | undefined>} */
  const steps = {
    ArrowRight: Math.min(spans.length - 1, i + 1),
    ArrowLeft: Math.max(0, i - 1),
    Home: 0,
    End: spans.length - 1,
    n: odd.find((k) => k > i) ?? odd[0],
    p: odd.findLast((k) => k < i) ?? odd.at(-1),
    Escape: -1,
  };
  return steps[key];
};

/** @param {HTMLElement} rows @param {Span[]} spans @param {State} state */
const listen = (rows, spans, state) => {
  rows.addEventListener("keydown", (event) => {
    if (isModified(event) || !spans.length) return;
    const to = stepFrom(spans, event.key, state.get("selected"));
    if (to === undefined) return;
    event.preventDefault();
    state.set("selected", to);
  });
  /** @param {"selected" | "hovered"} name */
  const setFrom = (name) => (/** @type {Event} */ event) => {
    const span = closest(event, "[data-span]")?.dataset.span;
    if (span !== undefined) state.set(name, Number(span));
  };
  rows.addEventListener("pointerover", setFrom("hovered"));
  rows.addEventListener("pointerleave", () => state.set("hovered", -1));
  rows.addEventListener("click", setFrom("selected"));
};

define("alignment", ({ box, data, state }) => {
  const spans = spansOf(data);
  const rows = make("div", "opd-rows2");
  const cells = spans.map((span, i) => drawSpan(data, span, i));
  rows.append(...cells);
  if (spans.length)
    put(rows, { role: "listbox", tabindex: "0", "aria-label": "Spans of the text" });
  else rows.append(make("span", "opd-soft", "(no text)"));
  const panel = spanPanel(data, spans);
  /** @type {HTMLElement | undefined} */
  let chosen;
  /** @type {HTMLElement | undefined} */
  let pointed;
  /** @param {number} i */
  const select = (i) => {
    chosen?.setAttribute("aria-selected", "false");
    chosen = cells[i];
    if (chosen) {
      chosen.id ||= unique();
      put(chosen, { "aria-selected": "true" });
      put(rows, { "aria-activedescendant": chosen.id });
      chosen.scrollIntoView({ block: "nearest" });
    }
    panel.show(i);
  };
  /** @param {number} i */
  const point = (i) => {
    pointed?.removeAttribute("data-pointed");
    pointed = cells[i];
    pointed?.setAttribute("data-pointed", "");
    panel.show(i < 0 ? state.get("selected") : i);
  };
  listen(rows, spans, state);
  state.on("selected", select);
  state.on("hovered", point);
  box.append(...titleOf(data), keyBar(data), rows, panel.node);
  if (state.get("selected") >= 0) select(state.get("selected"));
  else panel.show(-1);
});
