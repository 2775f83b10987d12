// Audits: the student's entropy along a text, the chunks that were audited, what the teacher wrote instead and what that weighs.
// `data` has { text, channels, audits, audit, alpha } as `audits.Audits.data` makes it.

import {
  clamp,
  define,
  drawGlyph,
  drawLegend,
  make,
  moveCursor,
  number,
  put,
  shape,
  wordOf,
} from "./core.js";
import { dotLine, stripPlace, walkButtons } from "./dots.js";
import { paintTracks } from "./tracks.js";

const TALL = 74;
const FLOOR = 16; // height of the entropy's curve, and of the positions under it

// The entropy of one completion with its chunks as bands; `choose(row)` hears clicks.
const entropyCurve = (choose) => {
  const node = make("div", "opd-curve");
  const inside = make("div");
  const svg = put(shape("svg"), {
    role: "img",
    "aria-label": "Entropy of the student along the text, with audited chunks",
  });
  let width = 0;
  inside.append(svg);
  node.append(inside);
  const draw = ({ first, size }, values, audits, chosen, here) => {
    width = Math.max(220, inside.clientWidth);
    const step = width / size;
    const own = values.slice(first, first + size);
    const top = Math.max(...own.filter(Number.isFinite), 0.01) * 1.08;
    const toY = (v) => TALL - (clamp(v, 0, top) / top) * (TALL - 14);
    const parts = [];
    for (const a of audits) {
      const look = `opd-band${a.row === chosen ? " opd-on" : ""}`;
      parts.push(
        shape("rect", {
          x: (a.row - first) * step,
          y: 0,
          width: Math.max(2, a.length * step - 1),
          height: TALL,
          class: look,
          "data-row": a.row,
        }),
      );
    }
    let path = "";
    let filled = `M0 ${TALL}`;
    own.forEach((v, i) => {
      if (!Number.isFinite(v)) return;
      const to = `${i * step} ${toY(v).toFixed(1)} H${((i + 1) * step).toFixed(1)}`;
      path += `${path ? "L" : "M"}${to}`;
      filled += `L${to}`;
    });
    parts.push(
      shape("path", { d: `${filled} V${TALL} Z`, class: "opd-under" }),
      shape("path", { d: path || "M0 0", class: "opd-over" }),
    );
    for (const a of audits) {
      const y = toY(values[a.row]);
      parts.push(
        shape("circle", {
          cx: (a.row - first + 0.5) * step,
          cy: Number.isFinite(y) ? y : TALL,
          r: 3.5,
          class: "opd-summit",
          "data-row": a.row,
        }),
      );
    }
    parts.push(shape("line", { x1: 0, x2: width, y1: TALL + 0.5, y2: TALL + 0.5 }));
    if (here >= first && here < first + size)
      parts.push(
        shape("path", { d: `M${(here - first + 0.5) * step} 0 V${TALL}`, class: "opd-now-line" }),
      );
    const write = (words, x, y, anchor) => {
      const label = shape("text", { x, y, "text-anchor": anchor });
      label.textContent = words;
      parts.push(label);
    };
    write(`entropy, to ${number(top / 1.08)} nats`, 0, 9, "start");
    write("0", 0, TALL + 13, "start");
    write(`position ${size - 1}`, width, TALL + 13, "end");
    put(svg, { width, height: TALL + FLOOR }).replaceChildren(...parts);
  };
  svg.addEventListener(
    "click",
    (event) => event.target.dataset.row !== undefined && choose(Number(event.target.dataset.row)),
  );
  return { node, draw, width: () => width };
};

// One number from 0 to 1 as a bar with its name.
const shareBar = (name, value, side, told = "") => {
  const row = make("div", `opd-share-row opd-of-${side}`);
  const track = make("span", "opd-track");
  const fill = make("span", "opd-fill");
  fill.style.width = `${100 * clamp(value, 0, 1)}%`;
  track.append(fill);
  row.append(
    make("span", "opd-name", name),
    track,
    make("span", "opd-value", number(value)),
    make("span", "opd-soft", told),
  );
  return row;
};

define("audits", ({ box, data, state }) => {
  const { text, channels, audit, audits, alpha } = data;
  const size = text.index.length;
  const [entropy, ...lanes] = channels;
  const found = new Map(audits.map((a) => [a.row, a]));
  const order = [...audits].sort((a, b) => a.weight - b.weight || a.row - b.row);
  const at = (row) => (row >= 0 && row < size ? found.get(audit[row]) : undefined);
  const pick = (row) => state.set("selected", row);
  const bar = make("div", "opd-bar opd-dots-bar");
  const key = make("div", "opd-key-line");
  const line = dotLine({ choose: pick, most: 1 });
  const legend = make("div");
  const spoken = put(make("div", "opd-live"), { "aria-live": "polite" });
  const place = stripPlace({
    text,
    state,
    fill: (strip, { first }) => {
      strip.paint(entropy);
      paintTracks(strip, lanes);
      for (const a of audits)
        strip.nodes
          .slice(Math.max(0, a.row - first), Math.max(0, a.row - first + a.length))
          .forEach((node) => node.classList.add("opd-audited"));
    },
  });
  const curve = entropyCurve(pick);
  const panel = make("div", "opd-panel opd-audit-panel");
  const head = make("div", "opd-audit-head");
  const both = make("div", "opd-audit-both");
  const texts = make("div", "opd-audit-texts");
  const sums = make("div", "opd-audit-sums");
  both.append(texts, sums);
  both.style.setProperty(
    "--answers",
    clamp(Math.max(...audits.map((a) => a.answers.length)), 2, 8),
  );
  panel.append(head, both);

  const written = (glyph, look) => {
    const node = put(make("span", `opd-written ${look}`), { dir: "auto" });
    drawGlyph(glyph, node);
    return node;
  };
  const answerRow = ({ glyph, similarity, count }) => {
    const row = make("div", "opd-answer opd-of-teacher");
    const track = make("span", "opd-track");
    const fill = make("span", "opd-fill");
    fill.style.width = `${100 * clamp(similarity, 0, 1)}%`;
    track.append(fill);
    row.append(
      track,
      make("span", "opd-value", number(similarity)),
      make("span", "opd-soft opd-times", count > 1 ? `×${count}` : ""),
      written(glyph, ""),
    );
    return row;
  };
  const formula = (a) => {
    if (alpha === null) return "";
    return `(k + α p) / (N + α) = (${number(a.similarity * a.n)} + ${number(alpha)} · ${number(a.prior)}) / (${a.n} + ${number(alpha)})`;
  };
  const reading = (a) => {
    if (a.similarity >= 0.9) return "the teacher writes the same";
    return a.answers[0]?.similarity >= 0.9
      ? "the teacher is of more than one mind"
      : "the teacher writes something else";
  };
  const show = (row) => {
    const a = at(row);
    const { whole } = place.open(row) ?? {};
    if (!whole) return;
    const from = (a?.row ?? row) - whole.first;
    if (!a) {
      head.replaceChildren(
        make("span", "opd-word", wordOf(text, text.index[row])),
        make("span", "opd-soft", `at position ${from} of completion ${whole.sample}`),
        make("b", "opd-verdict", "not audited: held near the reference"),
      );
      texts.replaceChildren(
        make(
          "div",
          "opd-soft",
          "Click a token with a line above it, a band or a mark; n and p go from chunk to chunk.",
        ),
      );
      return sums.replaceChildren();
    }
    const span = a.length > 1 ? `positions ${from} to ${from + a.length - 1}` : `position ${from}`;
    head.replaceChildren(
      make("span", "opd-soft", `chunk at ${span} of completion ${whole.sample}`),
      make("b", "opd-verdict", `weight ${number(a.weight)}: ${reading(a)}`),
    );
    const own = make("div", "opd-answer opd-of-student");
    own.append(make("b", "opd-side-name", "student"), written(a.glyph, "opd-own"));
    texts.replaceChildren(
      own,
      make(
        "div",
        "opd-side-name opd-of-teacher",
        `teacher, ${a.n} ${a.n > 1 ? "texts" : "text"}, by similarity`,
      ),
      ...a.answers.map(answerRow),
    );
    sums.replaceChildren(
      shareBar("prior p", a.prior, "student", "the student’s own"),
      shareBar("votes k / N", a.similarity, "teacher", "mean similarity"),
      shareBar("weight", a.weight, "both", "posterior; trains it"),
      make("div", "opd-soft", formula(a)),
    );
  };
  const redraw = () => {
    const row = state.get("selected");
    const { whole } = place.open(row) ?? {};
    line.draw(
      order.map((a) => ({
        row: a.row,
        value: a.weight,
        solid: true,
        told: `weight ${number(a.weight)}`,
      })),
      at(row)?.row,
    );
    if (whole)
      curve.draw(
        whole,
        entropy.values,
        audits.filter((a) => a.row >= whole.first && a.row < whole.first + whole.size),
        at(row)?.row,
        row,
      );
    for (const old of place.node.querySelectorAll(".opd-chosen-chunk"))
      old.classList.remove("opd-chosen-chunk");
    const a = at(row);
    const strip = place.open(row)?.strip;
    if (a && strip)
      strip.nodes
        .slice(a.row - strip.first, a.row - strip.first + a.length)
        .forEach((node) => node.classList.add("opd-chosen-chunk"));
  };
  const step = (way) => {
    const now = order.indexOf(at(state.get("selected")));
    pick(order[(now + way + order.length) % order.length].row);
  };
  const choose = (row) => {
    if (row < 0 || row >= size) return;
    show(row);
    redraw();
    const a = at(row);
    spoken.textContent = a
      ? `chunk, weight ${number(a.weight)}, prior ${number(a.prior)}, similarity ${number(a.similarity)}`
      : `${wordOf(text, text.index[row])}, not audited`;
    moveCursor(legend, entropy, entropy.values[row]);
  };

  const mean = audits.reduce((sum, a) => sum + a.similarity, 0) / audits.length;
  key.append(
    make("span", "", `◆ ${audits.length} audited chunk${audits.length > 1 ? "s" : ""} by weight`),
    make("span", "opd-soft", `mean similarity ${number(mean)}`),
    walkButtons("chunk", step),
  );
  bar.append(key, line.node);
  const second = make("div", "opd-bar opd-audit-legend");
  const told = make("div", "opd-lanes opd-soft");
  lanes.forEach((c, i) => {
    const item = make("span", "opd-lane-name");
    item.append(make("b", "", `${i + 1} ${c.label}`));
    told.append(item);
  });
  told.prepend(make("span", "", "a line above is a chunk; under the text, from 0 to 1:"));
  second.append(legend, told);
  drawLegend(legend, entropy);
  box.append(
    ...(data.title ? [make("div", "opd-title", data.title)] : []),
    bar,
    second,
    place.node,
    curve.node,
    panel,
    spoken,
  );
  state.on("selected", choose);
  const watch = new ResizeObserver(
    () => line.node.clientWidth && Math.abs(line.node.clientWidth - line.width()) > 1 && redraw(),
  );
  watch.observe(line.node);
  if (state.get("selected") < 0) state.set("selected", order[0].row);
  choose(state.get("selected"));
  return () => watch.disconnect();
});
