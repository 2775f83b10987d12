// Branches: a strip whose tokens with trees are marked, and the tree of the chosen token. A live page
// asks Python to grow the tree of any token.

/** @import { BranchesPayload, GrownBranch, GrownTree, GrownWriter } from "./types.js" */

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
  titleOf,
  wordAt,
} from "./core.js";
import { mapOfLong } from "./minimap.js";
import { tokenStrip } from "./strip.js";

/** @type {Record<string, string>} */
const WANTED = {
  student: "the student’s token",
  teacher: "the teacher’s token",
  asked: "asked for",
};

// ── Model ────────────────────────────────────────────────────────────────────────────────────────

/**
 * Say how the texts of a writer fared: "3 of 4 right" where every score is 0 or 1, else the mean.
 * @param {Pick<GrownWriter, "score" | "texts">} writer
 */
export const resultOf = ({ score, texts }) => {
  if (score === null) return "not scored";
  const known = texts.map((text) => text.score).filter((one) => one !== null);
  const isVerdict = known.every((one) => one === 0 || one === 1);
  const right = known.filter((one) => one === 1).length;
  return isVerdict ? `${right} of ${known.length} right` : `score ${number(score)}`;
};

/** @param {number | null} score */
export const signOfScore = (score) => {
  if (score === null) return "·";
  if (score === 1) return "✓";
  return score === 0 ? "✗" : number(score);
};

// ── The tree ─────────────────────────────────────────────────────────────────────────────────────

/** @param {string} name */
const ownerOf = (name) => (name === "student" ? "opd-of-student" : "opd-of-teacher");

/** @param {string} name @param {number} p */
const sideOf = (name, p) => {
  const node = make("span", `opd-side-p ${ownerOf(name)}`);
  const track = make("span", "opd-track");
  track.appendChild(make("span", "opd-fill")).style.width = `${100 * p}%`;
  node.append(make("span", "opd-soft", name), track, make("span", "", percent(p)));
  return node;
};

/** @param {GrownWriter} writer */
const writerLine = (writer) => {
  const node = make("li", `opd-writer ${ownerOf(writer.name)}`);
  const kl = writer.kl === null ? "" : `KL ${number(writer.kl)} nats per token`;
  node.append(
    make("b", "", `the ${writer.name} goes on`),
    make("span", "opd-value", resultOf(writer)),
    make("span", "opd-soft", kl),
  );
  const texts = make("details");
  const count = writer.texts.length;
  texts.append(make("summary", "", `${count} ${count === 1 ? "text" : "texts"}`));
  for (const { text, score, kl: own, finish } of writer.texts) {
    const line = make("div", "opd-go");
    const cut = finish === "length" ? "cut off, " : "";
    line.append(
      make("span", "", signOfScore(score)),
      put(make("span", "opd-text", text || "(nothing)"), { dir: "auto" }),
      make("span", "opd-soft", own === null ? "" : `${cut}KL ${number(own)}`),
    );
    texts.append(line);
  }
  node.append(texts);
  return node;
};

/** @param {GrownBranch} branch */
const branchNode = ({ token, by, p, writers }) => {
  const node = make("li", `opd-branch ${by === "asked" ? "" : ownerOf(by)}`);
  const head = make("div", "opd-branch-head");
  head.append(make("span", "opd-word", token), make("span", "opd-soft", WANTED[by] ?? by));
  for (const [name, share] of Object.entries(p)) head.append(sideOf(name, share));
  const list = make("ul");
  list.append(...writers.map(writerLine));
  node.append(head, list);
  return node;
};

/** @param {BranchesPayload} data */
const treePanel = ({ text, asks, trees }, /** @type {boolean} */ isLive) => {
  const node = make("div", "opd-tree");
  /** @param {GrownTree | undefined} tree @param {number} row */
  const show = (tree, row) => {
    const root = make("div", "opd-root");
    root.append(make("span", "opd-soft", `in place of ${wordAt(text, row)} at position ${row}`));
    if (tree) {
      const list = make("ul");
      list.append(...tree.branches.map(branchNode));
      node.replaceChildren(root, list);
      return;
    }
    const way = asks && isLive ? "The button below grows one." : "";
    const known = trees.length ? "Tokens with ▸ have trees; n and p go to them." : "";
    const ask = asks && !isLive ? "Show the view with .live() to grow one." : "";
    node.replaceChildren(
      root,
      make("div", "opd-soft", ["No tree here.", known, way, ask].join(" ")),
    );
  };
  return { node, show };
};

const ASKING = {
  name: "opd-force",
  words: "Force the teacher’s token here, and let both go on",
  meanwhile: "student and teacher are writing …",
};

define("branches", ({ box, data, state }) => {
  const { text, finish, channel } = data;
  const byRow = new Map(data.trees.map((tree) => [tree.row, tree]));
  const strip = tokenStrip({ text, finish, state });
  const map = mapOfLong(strip, []);
  const legend = make("div");
  const panel = treePanel(data, state.live);
  const spoken = liveRegion();
  const count = make("span", "opd-soft");
  box.append(...titleOf(data), promptBox(data.prompt), makeBar(count, legend));
  box.append(...(map ? [map.node] : []), strip.node, panel.node);

  const mark = () => {
    channel.peaks = [...byRow.keys()].sort((a, b) => a - b);
    strip.paint(channel);
    for (const row of byRow.keys()) put(strip.nodes[row], { "data-tree": "" });
    count.textContent = `${byRow.size} ${byRow.size === 1 ? "tree" : "trees"}; n and p go to them`;
    map?.draw([channel], { peaks: channel.peaks, found: [], chosen: state.get("selected") });
  };
  /** @param {number} row */
  const look = (row) => {
    if (row < 0 || row >= strip.size) return;
    panel.show(byRow.get(row), row);
  };
  if (state.live && data.asks) {
    const asking = askingLine(state, ASKING, (tree) => {
      byRow.set(tree.row, tree);
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
    const branches = byRow.get(row)?.branches.length ?? 0;
    if (row >= 0 && row < strip.size) {
      spoken.textContent = `${wordAt(text, row)}, ${branches ? `${branches} branches` : "no tree"}`;
    }
  });
  mark();
  look(state.get("selected"));
  return map?.close;
});
