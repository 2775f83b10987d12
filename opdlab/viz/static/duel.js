// The duel panel: student left, a rival right, the sampled token marked, all that is not shown as one hatched row.
// `data` has { text, channels, policies, duel } as `duel.duel` makes it.

import { figureOf, make, number, percent, put, wordOf } from "./core.js";

const duelBar = (owner) => {
  const cell = make("span", `opd-track opd-of-${owner}`);
  cell.append(make("span", "opd-fill"));
  return cell;
};

const duelRow = () => {
  const row = make("div", "opd-row");
  row.append(
    duelBar("student"),
    make("span", "opd-p"),
    make("span", "opd-word"),
    make("span", "opd-p"),
    duelBar("teacher"),
  );
  return row;
};

const fillRow = (row, word, left, right) => {
  const [barL, pL, name, pR, barR] = row.children;
  barL.firstChild.style.width = `${100 * left}%`;
  pL.textContent = percent(left);
  name.textContent = word;
  pR.textContent = right === null ? "" : percent(right);
  barR.firstChild.style.width = `${100 * (right ?? 0)}%`;
};

// Where the rows of each token begin, and its place among those that have rows.
export const duelIndex = ({ count }) => {
  const start = new Uint32Array(count.length);
  const place = new Uint32Array(count.length);
  for (let i = 1; i < count.length; i++)
    [start[i], place[i]] = [start[i - 1] + count[i - 1], place[i - 1] + (count[i - 1] > 0)];
  return { start, place };
};

export const duelPanel = (data) => {
  const { text, channels, policies, duel } = data;
  const index = duel && duelIndex(duel);
  const node = make("div", "opd-panel");
  const head = make("div", "opd-row opd-head");
  const rows = make("div", "opd-rows");
  const left = make("span", "opd-side opd-of-student");
  const now = make("span", "opd-now");
  const right = make("span", "opd-side opd-of-teacher");
  const most = duel ? Math.max(...duel.count) + 1 : 0;
  const facts = make("div", "opd-facts");
  head.append(left, now, right);
  for (let k = 0; k < most; k++) rows.append(duelRow());
  for (const channel of channels) {
    const fact = put(make("span", channel.minor ? "opd-fact opd-minor" : "opd-fact"), {
      "data-channel": channel.key,
    });
    fact.append(make("span", "opd-name", channel.label), make("span", "opd-value"));
    facts.append(fact);
  }
  node.append(head, rows, facts);
  if (!policies[1]) node.classList.add("opd-alone");

  const sideText = (policy, i) => {
    const entropy = channels.find((c) => c.key === `${policy}_entropy`);
    const rank = duel?.rank[policy];
    return [entropy && `entropy ${number(entropy.values[i])}`, rank && `rank ${rank[i]}`]
      .filter(Boolean)
      .join(" · ");
  };
  const showRows = (i, rival) => {
    const count = duel.count[i];
    const start = index.start[i];
    const sampled = text.id[text.index[i]];
    [...rows.children].forEach((row, k) => {
      const at = duel.row[start + k];
      const real = k < count;
      const last = k === count;
      row.classList.toggle("opd-empty", k > count);
      row.classList.toggle("opd-other", last);
      row.toggleAttribute("data-sampled", real && duel.ids[at] === sampled);
      if (real)
        fillRow(
          row,
          duel.names[at],
          duel.p.student?.[start + k] ?? 0,
          duel.p[rival]?.[start + k] ?? null,
        );
      else if (last && count)
        fillRow(
          row,
          "all others",
          duel.other.student?.[index.place[i]] ?? 0,
          duel.other[rival]?.[index.place[i]] ?? null,
        );
      else fillRow(row, "", 0, null);
      if (last && !count)
        row.children[2].textContent = "(this page has no room for what was wanted here)";
      row.classList.toggle("opd-none", last && !count);
    });
  };
  const show = (i, rival, chosen) => {
    for (const [side, policy] of [
      [left, "student"],
      [right, rival],
    ]) {
      side.replaceChildren(
        make("b", "", policy ?? ""),
        make("span", "opd-soft", policy ? sideText(policy, i) : ""),
      );
    }
    now.replaceChildren(
      make("span", "opd-word", wordOf(text, text.index[i])),
      make("span", "opd-soft", `sampled at position ${i}`),
    );
    now.setAttribute("title", `id ${text.id[text.index[i]]}`);
    if (duel) showRows(i, rival);
    [...facts.children].forEach((fact, k) => {
      const c = channels[k];
      const arrow =
        c.kind === "ratio" ? (c.values[i] > 0 ? " ▲" : c.values[i] < 0 ? " ▼" : "") : "";
      fact.lastChild.textContent = figureOf(c.values[i], c) + arrow;
      fact.toggleAttribute("data-on", c === chosen);
    });
  };
  const likeliest = (i) =>
    duel?.count[i] ? `, likeliest ${duel.names[duel.row[index.start[i]]]}` : "";
  return { node, show, likeliest };
};
