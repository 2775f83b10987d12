// Alignment: spans as cells of two rows; arrow keys walk them, the panel reads one.

import { define, make, number, put, shape, tintOf, unique } from "./core.js";

define("alignment", ({ box, data, state }) => {
  const [mine, other] = data.names;
  const count = data.cuts.length / 6;
  const rows = put(
    make("div", "opd-rows2"),
    count ? { role: "listbox", tabindex: "0", "aria-label": "Spans of the text" } : {},
  );
  const cut = (i) => [...data.cuts.subarray(6 * i, 6 * i + 6)];
  const panel = make("div", "opd-panel opd-align-facts");
  const cells = [];
  const channel = { kind: "ratio", limit: data.limit };
  const sum = (values) => values.reduce((a, b) => a + b, 0);
  // Of each token of a cell its centre in percent, and where its bytes begin and end as shares of the cell's.
  const places = ({ wide, size }, from, to) => {
    const widths = [...wide.subarray(from, to)];
    const sizes = [...size.subarray(from, to)];
    const all = sum(widths) || 1;
    const bytes = sum(sizes) || 1;
    let x = 0;
    let y = 0;
    return widths.map((w, k) => [
      (100 * ((x += w) - w / 2)) / all,
      y / bytes,
      (y += sizes[k]) / bytes,
    ]);
  };
  const joints = (above, below) =>
    above
      .flatMap(([x, a, b]) =>
        below
          .filter(([, c, d]) => Math.min(b, d) - Math.max(a, c) > 1e-9)
          .map(([y]) => `M${x.toFixed(1)} 0L${y.toFixed(1)} 20`),
      )
      .join("");
  const kindOf = ([a, b, c, d, , matched]) => (matched ? `${b - a}:${d - c}` : "unmatched");
  // The words of some tokens; of more than a cell shows, the first and the last, with the rest counted.
  const wordsOf = ({ word, at }, from, to, most = data.full) => {
    const all = (a, b) => Array.from(at.subarray(a, b), (i) => word[i]);
    const half = Math.floor(most / 2);
    return to - from <= most
      ? all(from, to)
      : [
          ...all(from, from + half),
          `… ${(to - from - 2 * half).toLocaleString("en")} more …`,
          ...all(to - half, to),
        ];
  };
  const side = (tokens, from, to, tint) => {
    const node = make("span", `opd-toks ${tint}`);
    const widths = [...tokens.wide.subarray(from, to)];
    node.style.gridTemplateColumns =
      widths.length > data.full ? "1fr" : widths.map((w) => `minmax(0, ${w}fr)`).join(" ") || "1fr";
    for (const word of wordsOf(tokens, from, to))
      node.append(make("span", word === "∅" ? "opd-silent" : "", word));
    return { node, widths };
  };
  const cell = (i) => {
    const at = cut(i);
    const [a, b, c, d, , matched] = at;
    const kl = data.kl ? data.kl[i] : NaN;
    const tint = tintOf(kl, channel);
    const kind = kindOf(at);
    const node = put(
      make(
        "span",
        `opd-pair${matched ? "" : " opd-unmatched"}${kind === "1:1" ? "" : " opd-several"}`,
      ),
      { role: "option", "aria-selected": "false", "data-span": i },
    );
    const top = side(data.ours, a, b, tint);
    const foot = side(data.theirs, c, d, tint);
    const wide = Math.max(sum(top.widths), sum(foot.widths));
    const loose = !matched || wide > data.long;
    const svg = put(shape("svg", { viewBox: "0 0 100 20", preserveAspectRatio: "none" }), {
      "aria-hidden": "true",
    });
    svg.append(
      shape("path", { d: loose ? "" : joints(places(data.ours, a, b), places(data.theirs, c, d)) }),
    );
    node.classList.toggle("opd-loose", loose);
    node.style.minWidth = `min(${wide}ch, 100%)`;
    node.append(top.node, svg, foot.node);
    put(node, {
      "aria-label": `span ${i}, ${kind}: ${wordsOf(data.ours, a, b, 12).join(" ")} is ${wordsOf(data.theirs, c, d, 12).join(" ")}`,
    });
    return node;
  };
  for (let i = 0; i < count; i++) cells.push(rows.appendChild(cell(i)));
  if (!count) rows.append(make("span", "opd-soft", "(no text)"));

  const look = (i) => {
    if (i < 0 || i >= count)
      return panel.replaceChildren(
        make(
          "div",
          "opd-soft",
          "Point at a span, or walk with the arrow keys; n and p go to the next that is not 1:1.",
        ),
      );
    const at = cut(i);
    const [a, b, c, d, size] = at;
    const kl = data.kl ? data.kl[i] : NaN;
    const line = (name, words) => {
      const node = make("div");
      node.append(make("b", "", name), make("span", "opd-word", words.join(" ") || "∅"));
      return node;
    };
    const told = [
      `span ${i}`,
      kindOf(at),
      `${size} byte${size === 1 ? "" : "s"}`,
      ...(Number.isNaN(kl)
        ? []
        : [`log q − log p ${number(kl, true)} nats ${kl > 0 ? "▲" : kl < 0 ? "▼" : ""}`]),
    ];
    panel.replaceChildren(
      make("div", "", told.join(" · ")),
      line(mine, wordsOf(data.ours, a, b, 12)),
      line(other, wordsOf(data.theirs, c, d, 12)),
    );
  };
  let chosen = null;
  let pointed = null;
  const select = (i) => {
    chosen?.setAttribute("aria-selected", "false");
    chosen = cells[i] ?? null;
    if (chosen) {
      chosen.id ||= unique();
      chosen.setAttribute("aria-selected", "true");
      rows.setAttribute("aria-activedescendant", chosen.id);
      chosen.scrollIntoView({ block: "nearest" });
    }
    look(i);
  };
  const point = (i) => {
    pointed?.removeAttribute("data-pointed");
    pointed = cells[i] ?? null;
    pointed?.setAttribute("data-pointed", "");
    look(i < 0 ? state.get("selected") : i);
  };
  const odd = Array.from({ length: count }, (_, i) => i).filter((i) => kindOf(cut(i)) !== "1:1");
  const step = (key, i) =>
    ({
      ArrowRight: Math.min(count - 1, i + 1),
      ArrowLeft: Math.max(0, i - 1),
      Home: 0,
      End: count - 1,
      n: odd.find((k) => k > i) ?? odd[0],
      p: odd.findLast((k) => k < i) ?? odd.at(-1),
      Escape: -1,
    })[key];
  rows.addEventListener("keydown", (event) => {
    const to =
      event.ctrlKey || event.metaKey || event.altKey || !count
        ? undefined
        : step(event.key, state.get("selected"));
    if (to === undefined) return;
    event.preventDefault();
    state.set("selected", to);
  });
  const spanAt = ({ target }) => target.closest?.("[data-span]")?.dataset.span;
  rows.addEventListener(
    "pointerover",
    (event) => spanAt(event) !== undefined && state.set("hovered", Number(spanAt(event))),
  );
  rows.addEventListener("pointerleave", () => state.set("hovered", -1));
  rows.addEventListener(
    "click",
    (event) => spanAt(event) !== undefined && state.set("selected", Number(spanAt(event))),
  );
  state.on("selected", select);
  state.on("hovered", point);

  const bar = make("div", "opd-bar");
  const keys = make("div", "opd-align-keys");
  keys.append(
    make("span", "", `${mine} above, ${other} below`),
    make("span", "", "grey: one token each"),
    make("span", "", "violet: several"),
    make("span", "", "hatched: unmatched"),
  );
  if (data.kl)
    keys.append(make("span", "", "orange: student over-confident; blue: teacher wants more"));
  bar.append(make("b", "", data.said), keys);
  box.append(...(data.title ? [make("div", "opd-title", data.title)] : []), bar, rows, panel);
  if (state.get("selected") >= 0) select(state.get("selected"));
  else look(-1);
});
