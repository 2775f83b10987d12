// Why: for the chosen token, the weight of all that teacher and student read, and the KL by layer.
// A live page asks Python for further tokens.

/** @import { ReasonAt, WeighedSide, WhyPayload } from "./types.js" */

import { askingLine } from "./asking.js";
import {
  define,
  drawLegend,
  liveRegion,
  make,
  makeBar,
  number,
  percent,
  promptBox,
  put,
  tintOf,
  titleOf,
  wordAt,
} from "./core.js";
import { linePlot } from "./lines.js";
import { mapOfLong } from "./minimap.js";
import { tokenStrip } from "./strip.js";

/**
 * Return the largest weights in words, as in "·q (hint) −3.2, ·7 (prefix) +0.4".
 * @param {Pick<WeighedSide, "largest" | "pieces" | "parts" | "weights">} side
 */
export const largestInWords = ({ largest, pieces, parts, weights }) =>
  largest.map((i) => `${pieces[i]} (${parts[i]}) ${number(weights[i], true)}`).join(", ");

/** @param {WeighedSide} side */
const sidePanel = (side) => {
  const { name, logp, limit, pieces, parts, weights, shares } = side;
  const node = make("div", name === "student" ? "opd-of-student" : "opd-of-teacher");
  const heading = make("div", "opd-heading");
  heading.append(make("b", "", name), make("span", "opd-soft", `log-prob ${number(logp)} nats`));
  const read = put(make("div", "opd-read"), {
    tabindex: "0",
    role: "group",
    "aria-label": `What the ${name} read; largest weights: ${largestInWords(side)}`,
  });
  const scale = { kind: "signed", limit };
  pieces.forEach((piece, i) => {
    const look = `opd-piece ${tintOf(weights[i], scale)}`;
    const span = put(make("span", look, piece), { "data-part": parts[i] });
    span.title = `${parts[i]}, ${number(weights[i], true)} nats`;
    read.append(span, " ");
  });
  const lines = Object.entries(shares).map(([part, share]) => {
    const line = make("div", "opd-share");
    const track = make("span", "opd-track");
    track.appendChild(make("span", "opd-fill")).style.width = `${100 * share}%`;
    line.append(make("span", "", part), track, make("span", "opd-value", percent(share)));
    return line;
  });
  const largest = make("div", "opd-soft", `largest: ${largestInWords(side)}`);
  node.append(heading, read, ...lines, largest);
  return node;
};

/** @param {WhyPayload} data @param {boolean} isLive */
const whyPanel = ({ text, asks, reasons }, isLive) => {
  const node = make("div", "opd-why-panel");
  /** @param {ReasonAt | undefined} reason @param {number} row */
  const show = (reason, row) => {
    const place = `${wordAt(text, row)} at position ${row}`;
    if (!reason) {
      const known = reasons.length ? "n and p go to tokens that were asked about." : "";
      const way = asks && isLive ? "The button below asks about this one." : "";
      const ask = asks && !isLive ? "Show the view with .live() to ask." : "";
      const words = ["Nobody asked about this token.", known, way, ask].filter(Boolean).join(" ");
      node.replaceChildren(make("div", "opd-soft", place), make("div", "opd-soft", words));
      return;
    }
    const told = "gradient × input, nats; violet speaks for the token, grey against it";
    const head = make("div", "opd-soft", `${reason.token || place}: ${told}`);
    const both = make("div", "opd-why-both");
    both.append(...reason.sides.map(sidePanel));
    node.replaceChildren(head, both);
    if (reason.depth) node.append(linePlot(reason.depth).node);
  };
  return { node, show };
};

const ASKING = {
  name: "opd-ask-why",
  words: "Ask why, at this token",
  meanwhile: "asking …",
};

define("why", ({ box, data, state }) => {
  const { text, finish, channel } = data;
  const byRow = new Map(data.reasons.map((reason) => [reason.row, reason]));
  const strip = tokenStrip({ text, finish, state });
  const map = mapOfLong(strip, []);
  const legend = make("div");
  const panel = whyPanel(data, state.live);
  const spoken = liveRegion();
  const count = make("span", "opd-soft");
  box.append(...titleOf(data), promptBox(data.prompt), makeBar(count, legend));
  box.append(...(map ? [map.node] : []), strip.node, panel.node);

  const mark = () => {
    channel.peaks = [...byRow.keys()].sort((a, b) => a - b);
    strip.paint(channel);
    const tokens = byRow.size === 1 ? "token" : "tokens";
    count.textContent = `${byRow.size} ${tokens} asked about; n and p go to them`;
    map?.draw([channel], { peaks: channel.peaks, found: [], chosen: state.get("selected") });
  };
  /** @param {number} row */
  const look = (row) => {
    if (row >= 0 && row < strip.size) panel.show(byRow.get(row), row);
  };
  if (state.live && data.asks) {
    const asking = askingLine(state, ASKING, (reason) => {
      byRow.set(reason.row, reason);
      mark();
      look(state.get("selected"));
    });
    box.append(asking);
  }
  box.append(spoken);
  drawLegend(legend, channel);
  state.on("selected", (row) => {
    look(row);
    map?.mark(row);
    const teacher = byRow.get(row)?.sides[0];
    const said = teacher ? `the teacher: ${largestInWords(teacher)}` : "nobody asked";
    if (row >= 0 && row < strip.size) spoken.textContent = `${wordAt(text, row)}, ${said}`;
  });
  mark();
  look(state.get("selected"));
  return map?.close;
});
