// The duel panel: student left, a rival right, the sampled token marked, all that is not shown as
// one hatched row.

/** @import { Channel, Duel, Numbers, Text } from "./types.js" */

import { arrowOf, figureOf, make, number, percent, put, wordAt } from "./core.js";

/** @param {string} owner */
const bar = (owner) => {
  const node = make("span", `opd-track opd-of-${owner}`);
  const fill = node.appendChild(make("span", "opd-fill"));
  return { node, fill };
};

const duelRow = () => {
  const node = make("div", "opd-row");
  const left = { ...bar("student"), share: make("span", "opd-p") };
  const right = { ...bar("teacher"), share: make("span", "opd-p") };
  const word = make("span", "opd-word");
  node.append(left.node, left.share, word, right.share, right.node);
  /** @param {string} name @param {number} student @param {number | null} rival */
  const fill = (name, student, rival) => {
    left.fill.style.width = `${100 * student}%`;
    left.share.textContent = percent(student);
    word.textContent = name;
    right.share.textContent = rival === null ? "" : percent(rival);
    right.fill.style.width = `${100 * (rival ?? 0)}%`;
  };
  return { node, word, fill };
};

/**
 * Return where the rows of each token begin, and its place among the tokens that have rows.
 * @param {Duel} duel
 */
export const duelIndex = ({ count }) => {
  const start = new Uint32Array(count.length);
  const place = new Uint32Array(count.length);
  for (let i = 1; i < count.length; i++) {
    start[i] = start[i - 1] + count[i - 1];
    place[i] = place[i - 1] + (count[i - 1] > 0 ? 1 : 0);
  }
  return { start, place };
};

/**
 * The candidates at one token, a row each, and all others in the last.
 * @param {Duel} duel
 * @param {Text} text
 */
const candidateRows = (duel, text) => {
  const node = make("div", "opd-rows");
  const index = duelIndex(duel);
  const rows = Array.from({ length: Math.max(...duel.count) + 1 }, duelRow);
  node.append(...rows.map((row) => row.node));
  /** @param {Record<string, Numbers>} shares @param {string} policy @param {number} at */
  const shareOf = (shares, policy, at) => shares[policy]?.[at] ?? null;
  /** @param {number} i @param {number} k @param {string} rival */
  const fillCandidate = (i, k, rival) => {
    const at = index.start[i] + k;
    const name = duel.names[duel.row[at]];
    rows[k].fill(name, shareOf(duel.p, "student", at) ?? 0, shareOf(duel.p, rival, at));
  };
  /** @param {number} i @param {number} k @param {string} rival */
  const fillOthers = (i, k, rival) => {
    const at = index.place[i];
    const { other } = duel;
    rows[k].fill("all others", shareOf(other, "student", at) ?? 0, shareOf(other, rival, at));
  };
  /** @param {number} i @param {string | undefined} rival */
  const show = (i, rival = "") => {
    const count = duel.count[i];
    const sampled = text.id[text.index[i]];
    rows.forEach(({ node: line, word, fill }, k) => {
      const isCandidate = k < count;
      const isLast = k === count;
      const id = duel.ids[duel.row[index.start[i] + k]];
      line.classList.toggle("opd-empty", k > count);
      line.classList.toggle("opd-other", isLast);
      line.classList.toggle("opd-none", isLast && !count);
      line.toggleAttribute("data-sampled", isCandidate && id === sampled);
      if (isCandidate) fillCandidate(i, k, rival);
      else if (isLast && count) fillOthers(i, k, rival);
      else fill("", 0, null);
      if (isLast && !count) word.textContent = "(this page has no room for what was wanted here)";
    });
  };
  /** @param {number} i */
  const likeliest = (i) => (duel.count[i] ? duel.names[duel.row[index.start[i]]] : "");
  return { node, show, likeliest };
};

// The value of every channel at one token; only ratios have an arrow, as their sign names a policy.
/** @param {Channel[]} channels */
const factList = (channels) => {
  const node = make("div", "opd-facts");
  const facts = channels.map((channel) => {
    const fact = make("span", channel.minor ? "opd-fact opd-minor" : "opd-fact");
    const value = make("span", "opd-value");
    put(fact, { "data-channel": channel.key }).append(
      make("span", "opd-name", channel.label),
      value,
    );
    node.append(fact);
    return { fact, value, channel };
  });
  /** @param {number} i @param {Channel} chosen */
  const show = (i, chosen) => {
    for (const { fact, value, channel } of facts) {
      const here = channel.values[i];
      const arrow = channel.kind === "ratio" ? arrowOf(here) : "";
      value.textContent = figureOf(here, channel) + arrow;
      fact.toggleAttribute("data-on", channel === chosen);
    }
  };
  return { node, show };
};

/**
 * @param {{ text: Text, channels: Channel[], policies: string[], duel: Duel | null }} data
 */
export const duelPanel = ({ text, channels, policies, duel }) => {
  const node = make("div", "opd-panel");
  const head = make("div", "opd-row opd-head");
  const left = make("span", "opd-side opd-of-student");
  const now = make("span", "opd-now");
  const right = make("span", "opd-side opd-of-teacher");
  head.append(left, now, right);
  const candidates = duel && candidateRows(duel, text);
  const facts = factList(channels);
  node.append(head, candidates ? candidates.node : make("div", "opd-rows"), facts.node);
  if (!policies[1]) node.classList.add("opd-alone");

  /** @param {string} policy @param {number} i */
  const sideText = (policy, i) => {
    const entropy = channels.find(({ key }) => key === `${policy}_entropy`);
    const rank = duel?.rank[policy];
    const parts = [];
    if (entropy) parts.push(`entropy ${number(entropy.values[i])}`);
    if (rank) parts.push(`rank ${rank[i]}`);
    return parts.join(" · ");
  };
  /** @param {HTMLElement} side @param {string | undefined} policy @param {number} i */
  const showSide = (side, policy, i) => {
    const words = make("span", "opd-soft", policy ? sideText(policy, i) : "");
    side.replaceChildren(make("b", "", policy), words);
  };
  /** @param {number} i @param {string | undefined} rival @param {Channel} chosen */
  const show = (i, rival, chosen) => {
    showSide(left, "student", i);
    showSide(right, rival, i);
    const place = make("span", "opd-soft", `sampled at position ${i}`);
    now.replaceChildren(make("span", "opd-word", wordAt(text, i)), place);
    now.title = `id ${text.id[text.index[i]]}`;
    candidates?.show(i, rival);
    facts.show(i, chosen);
  };
  /** @param {number} i */
  const likeliest = (i) => {
    const name = candidates?.likeliest(i);
    return name ? `, likeliest ${name}` : "";
  };
  return { node, show, likeliest };
};
