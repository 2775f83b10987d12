// Audits: the student's entropy along a text, the chunks that were audited, what the teacher wrote
// instead and what that weighs.

/** @import { Answer, Audit, AuditsPayload, Completion, Glyph, Numbers, State } from "./types.js" */

import {
  clamp,
  completionAt,
  define,
  drawGlyph,
  drawLegend,
  liveRegion,
  make,
  makeBar,
  moveCursor,
  number,
  put,
  rowOfEvent,
  shape,
  sum,
  svgText,
  titleOf,
  watchWidth,
  wordAt,
} from "./core.js";
import { dotLine, stripPlace, walkButtons } from "./dots.js";
import { nodesOf } from "./strip.js";
import { laneKey, paintTracks } from "./tracks.js";

const CURVE_HEIGHT = 74; // px
const FOOT_HEIGHT = 16; // px of the positions under the curve
const HINT =
  "Click a token with a line above it, a band or a mark; n and p go from chunk to chunk.";

/** @param {number} count @param {string} noun */
const plural = (count, noun) => `${count} ${noun}${count > 1 ? "s" : ""}`;

// ── The entropy of one completion with its chunks as bands ───────────────────────────────────────

/**
 * Return the path of a step curve and of the area under it; values that are not finite leave a gap.
 * @param {Numbers} values
 * @param {number} step px per token
 * @param {(value: number) => number} toY
 */
const stepPaths = (values, step, toY) => {
  let over = "";
  let under = `M0 ${CURVE_HEIGHT}`;
  values.forEach((value, i) => {
    if (!Number.isFinite(value)) return;
    const to = `${i * step} ${toY(value).toFixed(1)} H${((i + 1) * step).toFixed(1)}`;
    over += `${over ? "L" : "M"}${to}`;
    under += `L${to}`;
  });
  return { over: over || "M0 0", under: `${under} V${CURVE_HEIGHT} Z` };
};

/**
 * @param {Completion} completion
 * @param {Numbers} entropy
 * @param {Audit[]} audits of the completion
 * @param {{ audit: number | undefined, row: number }} chosen
 * @param {number} width
 */
const curveShapes = ({ first, size }, entropy, audits, chosen, width) => {
  const step = width / size;
  const values = entropy.slice(first, first + size);
  const top = Math.max(...values.filter(Number.isFinite), 0.01) * 1.08;
  const toX = (/** @type {number} */ row) => (row - first) * step;
  const toY = (/** @type {number} */ value) =>
    CURVE_HEIGHT - (clamp(value, 0, top) / top) * (CURVE_HEIGHT - 14);
  const bands = audits.map(({ row, length }) =>
    shape("rect", {
      x: toX(row),
      y: 0,
      width: Math.max(2, length * step - 1),
      height: CURVE_HEIGHT,
      class: row === chosen.audit ? "opd-band opd-on" : "opd-band",
      "data-row": row,
    }),
  );
  const summits = audits.map(({ row }) => {
    const y = toY(entropy[row]);
    return shape("circle", {
      cx: toX(row + 0.5),
      cy: Number.isFinite(y) ? y : CURVE_HEIGHT,
      r: 3.5,
      class: "opd-summit",
      "data-row": row,
    });
  });
  const { over, under } = stepPaths(values, step, toY);
  const isHere = chosen.row >= first && chosen.row < first + size;
  const cursor = isHere ? [`M${toX(chosen.row + 0.5)} 0 V${CURVE_HEIGHT}`] : [];
  const floor = { x1: 0, x2: width, y1: CURVE_HEIGHT + 0.5, y2: CURVE_HEIGHT + 0.5 };
  const foot = { y: CURVE_HEIGHT + 13 };
  const title = `entropy, to ${number(top / 1.08)} nats`;
  return [
    ...bands,
    shape("path", { d: under, class: "opd-under" }),
    shape("path", { d: over, class: "opd-over" }),
    ...summits,
    shape("line", floor),
    ...cursor.map((path) => shape("path", { d: path, class: "opd-now-line" })),
    svgText(title, { x: 0, y: 9, "text-anchor": "start" }),
    svgText("0", { x: 0, ...foot, "text-anchor": "start" }),
    svgText(`position ${size - 1}`, { x: width, ...foot, "text-anchor": "end" }),
  ];
};

/** @param {(row: number) => void} choose hears clicks on chunks */
const entropyCurve = (choose) => {
  const node = make("div", "opd-curve");
  const inside = make("div");
  const svg = put(shape("svg"), {
    role: "img",
    "aria-label": "Entropy of the student along the text, with audited chunks",
  });
  inside.append(svg);
  node.append(inside);
  /**
   * @param {Completion} completion
   * @param {Numbers} entropy
   * @param {Audit[]} audits
   * @param {{ audit: number | undefined, row: number }} chosen
   */
  const draw = (completion, entropy, audits, chosen) => {
    const width = Math.max(220, inside.clientWidth);
    put(svg, { width, height: CURVE_HEIGHT + FOOT_HEIGHT });
    svg.replaceChildren(...curveShapes(completion, entropy, audits, chosen, width));
  };
  svg.addEventListener("click", (event) => {
    const row = rowOfEvent(event);
    if (row >= 0) choose(row);
  });
  return { node, draw };
};

// ── The panel of one chunk ───────────────────────────────────────────────────────────────────────

// A bar from 0 to 1.
/** @param {number} value */
const shareTrack = (value) => {
  const track = make("span", "opd-track");
  const fill = track.appendChild(make("span", "opd-fill"));
  fill.style.width = `${100 * clamp(value, 0, 1)}%`;
  return track;
};

/** @param {string} name @param {number} value @param {string} side @param {string} told */
const shareBar = (name, value, side, told) => {
  const row = make("div", `opd-share-row opd-of-${side}`);
  row.append(make("span", "opd-name", name), shareTrack(value));
  row.append(make("span", "opd-value", number(value)), make("span", "opd-soft", told));
  return row;
};

/** @param {Glyph} glyph @param {string} look */
const written = (glyph, look) => {
  const node = put(make("span", `opd-written ${look}`), { dir: "auto" });
  drawGlyph(glyph, node);
  return node;
};

/** @param {Answer} answer */
const answerRow = ({ glyph, similarity, count }) => {
  const row = make("div", "opd-answer opd-of-teacher");
  const times = make("span", "opd-soft opd-times", count > 1 ? `×${count}` : "");
  const value = make("span", "opd-value", number(similarity));
  row.append(shareTrack(similarity), value, times, written(glyph, ""));
  return row;
};

/** @param {Audit} audit @param {number | null} alpha */
const formulaOf = ({ similarity, n, prior }, alpha) => {
  if (alpha === null) return "";
  const votes = `${number(similarity * n)} + ${number(alpha)} · ${number(prior)}`;
  return `(k + α p) / (N + α) = (${votes}) / (${n} + ${number(alpha)})`;
};

/** @param {Audit} audit */
const readingOf = ({ similarity, answers }) => {
  if (similarity >= 0.9) return "the teacher writes the same";
  return answers[0]?.similarity >= 0.9
    ? "the teacher is of more than one mind"
    : "the teacher writes something else";
};

/** @param {AuditsPayload} data */
const auditPanel = ({ text, audits, alpha }) => {
  const node = make("div", "opd-panel opd-audit-panel");
  const head = make("div", "opd-audit-head");
  const both = make("div", "opd-audit-both");
  const texts = make("div", "opd-audit-texts");
  const sums = make("div", "opd-audit-sums");
  both.append(texts, sums);
  const most = Math.max(...audits.map(({ answers }) => answers.length));
  both.style.setProperty("--answers", String(clamp(most, 2, 8)));
  node.append(head, both);
  /** @param {number} row @param {Completion} completion */
  const showNone = (row, { first, sample }) => {
    head.replaceChildren(
      make("span", "opd-word", wordAt(text, row)),
      make("span", "opd-soft", `at position ${row - first} of completion ${sample}`),
      make("b", "opd-verdict", "not audited: held near the reference"),
    );
    texts.replaceChildren(make("div", "opd-soft", HINT));
    sums.replaceChildren();
  };
  /** @param {Audit} audit @param {Completion} completion */
  const show = (audit, { first, sample }) => {
    const from = audit.row - first;
    const { length, weight } = audit;
    const span = length > 1 ? `positions ${from} to ${from + length - 1}` : `position ${from}`;
    head.replaceChildren(
      make("span", "opd-soft", `chunk at ${span} of completion ${sample}`),
      make("b", "opd-verdict", `weight ${number(weight)}: ${readingOf(audit)}`),
    );
    const own = make("div", "opd-answer opd-of-student");
    own.append(make("b", "opd-side-name", "student"), written(audit.glyph, "opd-own"));
    const heading = `teacher, ${plural(audit.n, "text")}, by similarity`;
    texts.replaceChildren(own, make("div", "opd-side-name opd-of-teacher", heading));
    texts.append(...audit.answers.map(answerRow));
    sums.replaceChildren(
      shareBar("prior p", audit.prior, "student", "the student’s own"),
      shareBar("votes k / N", audit.similarity, "teacher", "mean similarity"),
      shareBar("weight", weight, "both", "posterior; trains it"),
      make("div", "opd-soft", formulaOf(audit, alpha)),
    );
  };
  return { node, show, showNone };
};

// ── The view ─────────────────────────────────────────────────────────────────────────────────────

/** @param {AuditsPayload} data @param {State} state */
const makeParts = (data, state) => {
  const { text, channels, audits } = data;
  const [entropy, ...lanes] = channels;
  const choose = (/** @type {number} */ row) => state.set("selected", row);
  const place = stripPlace({
    text,
    state,
    fill: (strip) => {
      strip.paint(entropy);
      paintTracks(strip, lanes);
      for (const { row, length } of audits) {
        for (const token of nodesOf(strip, row, row + length)) token.classList.add("opd-audited");
      }
    },
  });
  const legend = make("div");
  drawLegend(legend, entropy);
  const second = make("div", "opd-bar opd-audit-legend");
  const words = "a line above is a chunk; under the text, from 0 to 1:";
  second.append(legend, laneKey(words, lanes));
  return {
    entropy,
    place,
    legend,
    second,
    line: dotLine({ choose, most: 1 }),
    curve: entropyCurve(choose),
    panel: auditPanel(data),
    spoken: liveRegion(),
  };
};

/**
 * The line above: how many chunks, and the buttons that go through them by weight.
 * @param {Audit[]} order
 * @param {(step: number) => void} go
 */
const headLine = (order, go) => {
  const node = make("div", "opd-key-line");
  const mean = sum(order.map(({ similarity }) => similarity)) / order.length;
  node.append(
    make("span", "", `◆ ${plural(order.length, "audited chunk")} by weight`),
    make("span", "opd-soft", `mean similarity ${number(mean)}`),
    walkButtons("chunk", go),
  );
  return node;
};

/**
 * Open the strip of a row and mark the chunk that the row lies in.
 * @param {ReturnType<typeof stripPlace>} place
 * @param {number} row
 * @param {Audit | undefined} audit
 */
const markChunk = (place, row, audit) => {
  for (const old of place.node.querySelectorAll(".opd-chosen-chunk")) {
    old.classList.remove("opd-chosen-chunk");
  }
  const strip = place.open(row)?.strip;
  if (!audit || !strip) return;
  for (const token of nodesOf(strip, audit.row, audit.row + audit.length)) {
    token.classList.add("opd-chosen-chunk");
  }
};

define("audits", ({ box, data, state }) => {
  const { text, audits } = data;
  const size = text.index.length;
  const parts = makeParts(data, state);
  const { entropy, place, line, curve, panel } = parts;
  const byRow = new Map(audits.map((audit) => [audit.row, audit]));
  const order = [...audits].sort((a, b) => a.weight - b.weight || a.row - b.row);
  /** @param {number} row */
  const auditAt = (row) => (row >= 0 && row < size ? byRow.get(data.audit[row]) : undefined);

  const redraw = () => {
    const row = state.get("selected");
    const chosen = { audit: auditAt(row)?.row, row };
    const completion = completionAt(text, row);
    const dots = order.map(({ row: at, weight }) => ({
      row: at,
      value: weight,
      solid: true,
      told: `weight ${number(weight)}`,
    }));
    line.draw(dots, chosen.audit);
    markChunk(place, row, auditAt(row));
    if (!completion) return;
    const { first, size: length } = completion;
    const here = audits.filter((audit) => audit.row >= first && audit.row < first + length);
    curve.draw(completion, entropy.values, here, chosen);
  };
  /** @param {number} row */
  const choose = (row) => {
    const completion = completionAt(text, row);
    if (!completion) return;
    const audit = auditAt(row);
    if (audit) panel.show(audit, completion);
    else panel.showNone(row, completion);
    redraw();
    const numbers = audit && [audit.weight, audit.prior, audit.similarity].map((n) => number(n));
    parts.spoken.textContent = numbers
      ? `chunk, weight ${numbers[0]}, prior ${numbers[1]}, similarity ${numbers[2]}`
      : `${wordAt(text, row)}, not audited`;
    moveCursor(parts.legend, entropy, entropy.values[row]);
  };
  /** @param {number} step */
  const go = (step) => {
    const now = order.findIndex((audit) => audit === auditAt(state.get("selected")));
    state.set("selected", order[(now + step + order.length) % order.length].row);
  };

  const bar = makeBar(headLine(order, go), line.node);
  bar.classList.add("opd-dots-bar");
  box.append(...titleOf(data), bar, parts.second, place.node, curve.node, panel.node, parts.spoken);
  state.on("selected", choose);
  if (state.get("selected") < 0) state.set("selected", order[0].row);
  choose(state.get("selected"));
  return watchWidth(line.node, line.width, redraw);
});
