// Regimes: the tokens of a trace as points over two numbers, with two lines to drag, shares by quadrant, a region to brush.
// `data` has { text, axes, sorts, amounts } as `regimes.Regimes.data` makes it.

import {
  HUES,
  KIND_HUES,
  clamp,
  define,
  drawGlyph,
  groupsOf,
  make,
  number,
  percent,
  put,
  shape,
  unique,
  wordOf,
} from "./core.js";

const LEFT = 46;
const RIGHT = 64;
const TOP = 62;
const BOTTOM = 30;
const PAD = 8; // room around the points for ticks and histograms, and within, px
const BINS = 60;
const NEAR = 9;
const LISTED = 60;
const CONTEXT = 8;
const NAMES = ["low x, high y", "high x, high y", "low x, low y", "high x, low y"];
const SHAPES = [
  (c) => c.arc(6, 6, 3, 0, 7),
  (c) => c.rect(3.2, 3.2, 5.6, 5.6),
  (c) => (c.moveTo(6, 2), c.lineTo(10, 9.5), c.lineTo(2, 9.5)),
  (c) => (c.moveTo(6, 1.8), c.lineTo(10.2, 6), c.lineTo(6, 10.2), c.lineTo(1.8, 6)),
  (c) => (c.moveTo(6, 10), c.lineTo(10, 2.5), c.lineTo(2, 2.5)),
  (c) => (c.rect(5, 1.5, 2, 9), c.rect(1.5, 5, 9, 2)),
];

// ── Scales ───────────────────────────────────────────────────────────────────────────────────────────────────────

const bends = {
  linear: () => [(v) => v, (u) => u],
  log: () => [(v) => Math.log(Math.max(v, 1e-30)), Math.exp],
  asinh: (soft) => [(v) => Math.asinh(v / soft), (u) => soft * Math.sinh(u)],
};

// { at(value) from 0 to 1, of(place) back }; infinities lie at the ends.
const scaleOf = ({ scale, soft, ends }) => {
  const [bend, back] = bends[scale](soft);
  const low = bend(ends[0]);
  const high = bend(ends[1]);
  return {
    at: (v) => clamp((bend(v) - low) / (high - low), 0, 1),
    of: (place) => back(low + place * (high - low)),
  };
};

const ticksOf = ({ scale, ends: [low, high] }) => {
  if (scale !== "linear") {
    const decades = (by) =>
      Array.from({ length: 9 }, (_, i) => Number((by * 10 ** (5 - i)).toPrecision(1)));
    const both = (v) => (scale === "log" ? [v] : [v, -v]);
    return [
      ...(scale === "log" ? [] : [0]),
      ...[1, 2, 5].flatMap((by) => decades(by).flatMap(both)),
    ].filter((v) => v >= low && v <= high);
  }
  const step = 10 ** Math.floor(Math.log10((high - low) / 3));
  const wide = step * ((high - low) / step > 6 ? 2 : 1);
  const out = [];
  for (let v = Math.ceil(low / wide) * wide; v <= high + 1e-9 * wide; v += wide)
    out.push(Number(v.toPrecision(6)));
  return out;
};

// Ticks that keep apart by `gap` (a share of the axis), the first ones first.
const spaced = (axis, gap) => {
  const scale = scaleOf(axis);
  const kept = [];
  for (const value of ticksOf(axis))
    if (kept.every((other) => Math.abs(scale.at(other) - scale.at(value)) >= gap)) kept.push(value);
  return kept;
};

const axisTitle = (axis) => (axis.unit ? `${axis.label}, ${axis.unit}` : axis.label);

// ── Groups: a hue and a shape each ───────────────────────────────────────────────────────────────────────────────

const groupLooks = (kind) => {
  let own = 0;
  return (kind?.names ?? ["tokens"]).map((name, i) => ({
    hue: HUES[kind ? kind.hues[i] : "amount"]?.slice(0, 3) ?? KIND_HUES[own++ % KIND_HUES.length],
    shape: i % SHAPES.length,
  }));
};

const sprite = ({ hue, shape: form }, ratio) => {
  const canvas = put(document.createElement("canvas"), { width: 12 * ratio, height: 12 * ratio });
  const c = canvas.getContext("2d");
  c.scale(ratio, ratio);
  c.fillStyle = `rgb(${hue})`;
  c.beginPath();
  SHAPES[form](c);
  c.fill();
  return canvas;
};

// ── One row in its text: what stands before it, the token, what comes after ──────────────────────────────────────

const contextOf = (text) => {
  const cache = new Map();
  const groupsIn = ({ first, size }) => (
    cache.has(first) || cache.set(first, groupsOf(text, first, size)),
    cache.get(first)
  );
  return (row) => {
    const whole = text.texts.find(({ first, size }) => row >= first && row < first + size);
    const groups = groupsIn(whole);
    let low = 0;
    let high = groups.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (groups[middle].first <= row) low = middle;
      else high = middle - 1;
    }
    return {
      whole,
      before: groups.slice(Math.max(0, low - CONTEXT), low),
      here: groups[low],
      after: groups.slice(low + 1, low + 1 + CONTEXT),
    };
  };
};

define("regimes", ({ box, data, state }) => {
  const { text, axes, sorts, amounts } = data;
  const size = text.index.length;
  const inContext = contextOf(text);
  const axisOf = (which) => axes.find(({ key }) => key === state.get(which)) ?? axes[0];
  const kindOf = () => sorts.find(({ key }) => key === state.get("by"));
  const lineOf = (axis) => state.get("thresholds")[axis.key] ?? axis.start;
  let x;
  let y;
  let sx;
  let sy;
  let kind;
  let looks;
  let shown;
  let px;
  let py;
  let cells;
  let width = 0;
  let height = 0;
  let listed = [];

  // ── What stands on the page ──
  const stage = make("div", "opd-stage");
  const canvas = make("canvas");
  const frame = put(shape("svg"), { "aria-hidden": "true" });
  const plot = put(make("div", "opd-points"), {
    role: "group",
    tabindex: "0",
    "aria-label":
      "Points. 1 to 4 take a quadrant, arrows move the region, with shift its size, Escape clears",
  });
  const region = make("div", "opd-region");
  const dots = {
    selected: make("div", "opd-ring"),
    hovered: make("div", "opd-ring opd-faint-ring"),
  };
  const handle = (which) =>
    put(make("div", `opd-handle opd-handle-${which}`), {
      role: "slider",
      tabindex: "0",
      "data-axis": which,
    });
  const handles = { x: handle("x"), y: handle("y") };
  const note = make("div", "opd-soft opd-note");
  plot.append(region, dots.hovered, dots.selected);
  stage.append(canvas, frame, plot, handles.x, handles.y);

  const chooser = (which, options, label) => {
    const holder = make("label", "opd-choose", label);
    const select = put(make("select"), { "data-axis": which });
    for (const [key, name] of options) select.append(put(make("option", "", name), { value: key }));
    select.addEventListener("change", () => state.set(which, select.value));
    holder.append(select);
    return holder;
  };
  const named = axes.map((axis) => [axis.key, axis.label]);
  const choices = [["", "nothing"], ...sorts.map(({ key }) => [key, key.replaceAll("_", " ")])];
  const bar = make("div", "opd-bar opd-regimes-bar");
  const choosers = make("div", "opd-choosers");
  const chips = put(make("div", "opd-chips"), {
    role: "group",
    "aria-label": "Groups; press to hide or show",
  });
  choosers.append(
    chooser("y", named, "up"),
    chooser("x", named, "across"),
    ...(sorts.length ? [chooser("by", choices, "sorted by")] : []),
  );
  bar.append(choosers, chips);
  const table = make("div", "opd-quadrants");
  const both = make("div", "opd-both");
  const list = put(make("div", "opd-kwic"), {
    role: "listbox",
    tabindex: "0",
    "aria-label": "Tokens of the region in their texts",
  });
  const head = make("div", "opd-kwic-head opd-soft");
  const spoken = put(make("div", "opd-live"), { "aria-live": "polite" });
  both.append(stage, table);
  box.append(
    ...(data.title ? [make("div", "opd-title", data.title)] : []),
    bar,
    both,
    note,
    head,
    list,
    spoken,
  );

  // ── Quadrants ──
  const cellsOf = NAMES.map(() => {
    const cell = make("div", "opd-quadrant");
    const title = make("button", "opd-button");
    put(title, { type: "button" });
    cell.append(title);
    const bars = ["tokens", ...Object.keys(amounts)].map((key) => {
      const line = make("div", "opd-share");
      const track = make("span", "opd-track");
      const fill = make("span", "opd-fill");
      const value = make("span", "opd-value");
      track.append(fill);
      line.append(make("span", "opd-name", key === "kl" ? "KL" : key), track, value);
      cell.append(line);
      return { key, fill, value };
    });
    table.append(cell);
    return { cell, title, bars };
  });
  const whichOf = (row, atX, atY) =>
    (y.values[row] >= atY ? 0 : 2) + (x.values[row] >= atX ? 1 : 0);
  const count = () => {
    const keys = Object.keys(amounts);
    const atX = lineOf(x);
    const atY = lineOf(y);
    const sums = NAMES.map(() => [0, ...keys.map(() => 0)]);
    for (let i = 0; i < size; i++) {
      if (!shown[i]) continue;
      const sum = sums[whichOf(i, atX, atY)];
      sum[0]++;
      for (let k = 0; k < keys.length; k++) sum[k + 1] += amounts[keys[k]][i];
    }
    const totals = sums.reduce((a, b) => a.map((v, k) => v + b[k]));
    const words = [
      [x.less || `${x.label} low`, x.more || `${x.label} high`],
      [y.less || `${y.label} low`, y.more || `${y.label} high`],
    ];
    cellsOf.forEach(({ title, bars }, q) => {
      title.textContent = `${words[1][q < 2 ? 1 : 0]} · ${words[0][q % 2]}`;
      bars.forEach(({ fill, value }, k) => {
        const share = totals[k] ? sums[q][k] / totals[k] : 0;
        fill.style.width = `${100 * share}%`;
        value.textContent = percent(share);
      });
    });
    const out = size - totals[0];
    const hidden = (state.get("hidden") ?? []).length;
    note.textContent = [
      `${totals[0].toLocaleString("en")} of ${size.toLocaleString("en")} tokens`,
      out
        ? hidden
          ? "the others are hidden or have no value here"
          : "the others have no value here"
        : "",
      "bars beside the points: √ of counts",
    ]
      .filter(Boolean)
      .join(" · ");
  };

  // ── Drawing ──
  const toX = (v) => LEFT + PAD + sx.at(v) * (width - LEFT - RIGHT - 2 * PAD);
  const toY = (v) => TOP + PAD + (1 - sy.at(v)) * (height - TOP - BOTTOM - 2 * PAD);
  const drawFrame = () => {
    const left = LEFT;
    const right = width - RIGHT;
    const top = TOP;
    const bottom = height - BOTTOM;
    const write = (where, words, anchor = "middle") => {
      const node = shape("text", { ...where, "text-anchor": anchor });
      node.textContent = words;
      return node;
    };
    const lines = [];
    for (const v of spaced(x, 42 / (right - left))) {
      lines.push(
        shape("line", { x1: toX(v), x2: toX(v), y1: bottom, y2: bottom + 4 }),
        write({ x: toX(v), y: bottom + 14 }, number(v)),
      );
    }
    for (const v of spaced(y, 22 / (bottom - top))) {
      lines.push(
        shape("line", { x1: left - 4, x2: left, y1: toY(v), y2: toY(v) }),
        write({ x: left - 7, y: toY(v) + 4 }, number(v), "end"),
      );
    }
    lines.push(
      write({ x: right, y: bottom + 27 }, `${axisTitle(x)} →`, "end"),
      write({ x: 4, y: 11 }, `↑ ${axisTitle(y)}`, "start"),
    );
    lines.push(shape("rect", { x: left, y: top, width: right - left, height: bottom - top }));
    put(frame, { width, height, viewBox: `0 0 ${width} ${height}` }).replaceChildren(...lines);
    for (const [key, value] of Object.entries({
      left,
      top,
      width: right - left,
      height: bottom - top,
    }))
      plot.style[key] = `${value}px`;
  };
  const histogram = (c, scale, values, across) => {
    const counts = new Uint32Array(BINS);
    const length = (across ? width - LEFT - RIGHT : height - TOP - BOTTOM) - 2 * PAD;
    const room = 24;
    for (let i = 0; i < size; i++)
      if (shown[i]) counts[Math.min(BINS - 1, Math.floor(scale.at(values[i]) * BINS))]++;
    const most = Math.sqrt(Math.max(...counts, 1));
    const thick = length / BINS;
    counts.forEach((n, i) => {
      const tall = (room * Math.sqrt(n)) / most;
      if (across) c.fillRect(LEFT + PAD + i * thick, TOP - 3 - tall, thick - 1, tall);
      else c.fillRect(width - RIGHT + 3, height - BOTTOM - PAD - (i + 1) * thick, tall, thick - 1);
    });
  };
  const drawPoints = () => {
    const ratio = Math.min(2, window.devicePixelRatio || 1);
    const c = canvas.getContext("2d");
    const sprites = looks.map((look) => sprite(look, ratio));
    put(canvas, { width: Math.round(width * ratio), height: Math.round(height * ratio) });
    Object.assign(canvas.style, { width: `${width}px`, height: `${height}px` });
    c.scale(ratio, ratio);
    c.fillStyle = "rgba(128,128,128,0.55)";
    histogram(c, sx, x.values, true);
    histogram(c, sy, y.values, false);
    c.globalAlpha = clamp(30 / Math.sqrt(size), 0.13, 0.9);
    [px, py, cells] = [new Float32Array(size), new Float32Array(size), new Map()];
    for (let i = 0; i < size; i++) {
      if (!shown[i]) continue;
      [px[i], py[i]] = [toX(x.values[i]), toY(y.values[i])];
      c.drawImage(
        sprites[kind ? kind.index[i] : 0],
        Math.round(px[i]) - 6,
        Math.round(py[i]) - 6,
        12,
        12,
      );
      const key = Math.floor(px[i] / NEAR) + 4096 * Math.floor(py[i] / NEAR);
      if (!cells.has(key)) cells.set(key, []);
      cells.get(key).push(i);
    }
  };
  const placeDot = (name) => {
    const row = state.get(name);
    const dot = dots[name];
    dot.hidden = !(row >= 0 && row < size && shown[row]);
    if (!dot.hidden)
      Object.assign(dot.style, { left: `${px[row] - LEFT}px`, top: `${py[row] - TOP}px` });
  };
  const placeHandles = () => {
    for (const [which, axis] of [
      ["x", x],
      ["y", y],
    ]) {
      const at = lineOf(axis);
      const place = which === "x" ? toX(at) : toY(at);
      const node = handles[which];
      Object.assign(
        node.style,
        which === "x"
          ? { left: `${place}px`, top: `${TOP - 26}px`, height: `${height - TOP - BOTTOM + 26}px` }
          : { top: `${place}px`, left: `${LEFT}px`, width: `${width - LEFT - RIGHT + 28}px` },
      );
      put(node, {
        "aria-label": `line of ${axis.label}`,
        "aria-valuemin": axis.ends[0],
        "aria-valuemax": axis.ends[1],
        "aria-valuenow": clamp(at, ...axis.ends),
        "aria-valuetext": `${number(at)} ${axis.unit}`.trim(),
        "aria-orientation": which === "x" ? "horizontal" : "vertical",
        "data-value": number(at),
      });
    }
  };
  const placeRegion = () => {
    const now = state.get("region");
    region.hidden = now.length !== 4;
    if (region.hidden) return;
    const [left, right, low, high] = [
      toX(now[0]) - LEFT,
      toX(now[1]) - LEFT,
      toY(now[2]) - TOP,
      toY(now[3]) - TOP,
    ];
    Object.assign(region.style, {
      left: `${left}px`,
      top: `${high}px`,
      width: `${right - left}px`,
      height: `${low - high}px`,
    });
  };

  // ── The region's tokens in their texts ──
  const rowsIn = ([left, right, low, high]) => {
    const rows = [];
    for (let i = 0; i < size; i++) {
      const atX = clamp(x.values[i], ...x.ends);
      const atY = clamp(y.values[i], ...y.ends); // infinities lie at the ends
      if (shown[i] && atX >= left && atX <= right && atY >= low && atY <= high) rows.push(i);
    }
    return rows;
  };
  const runsOf = (rows) =>
    rows.reduce(
      (runs, row) => (
        row === runs.at(-1) + 1 ? (runs[runs.length - 1] = row) : runs.push(row, row),
        runs
      ),
      [],
    );
  const sizeOf = (row) => (amounts.kl ? amounts.kl[row] : Math.abs(x.values[row]));
  const line = (row) => {
    const { whole, before, here, after } = inContext(row);
    const node = put(make("div", "opd-kwic-line"), {
      role: "option",
      "aria-selected": "false",
      "data-row": row,
    });
    const part = (look, groups) => {
      const cell = put(make("span", look), { dir: "auto" });
      const holder = make("span");
      for (const { glyph } of groups) drawGlyph(glyph, holder);
      cell.append(holder);
      return cell;
    };
    const name = kind ? kind.names[kind.index[row]] : "";
    node.append(
      make("span", "opd-soft", `${whole.sample}:${row - whole.first}`),
      part("opd-before", before),
      part("opd-kwic-here", [here]),
      part("opd-after", after),
    );
    node.append(
      make("span", "opd-soft opd-which", name),
      make(
        "span",
        "opd-number",
        `${number(x.values[row], x.ends[0] < 0)}, ${number(y.values[row], y.ends[0] < 0)}`,
      ),
    );
    node.id = unique();
    return node;
  };
  const showList = () => {
    const now = state.get("region");
    const rows = now.length === 4 ? rowsIn(now) : [];
    listed = [...rows].sort((a, b) => sizeOf(b) - sizeOf(a)).slice(0, LISTED);
    list.replaceChildren(...listed.map(line));
    list.hidden = !listed.length;
    const cut =
      rows.length > listed.length
        ? `; the ${listed.length} of largest ${amounts.kl ? "KL" : x.label} are listed`
        : "";
    head.textContent =
      now.length === 4
        ? `${rows.length.toLocaleString("en")} tokens in the region${cut}`
        : "Drag over points, or press a quadrant’s name, to read its tokens in their texts.";
    return rows;
  };
  // Strips of the text that is looked at mark the region's tokens in it: runs of rows, first and last of each.
  const tellStrips = (rows) => {
    const seen = state.get("selected");
    const whole = text.texts.find(({ first, size: n }) => seen >= first && seen < first + n);
    state.set(
      "brush",
      whole
        ? runsOf(rows.filter((row) => row >= whole.first && row < whole.first + whole.size))
        : [],
    );
  };
  const markLine = () => {
    const at = listed.indexOf(state.get("selected"));
    [...list.children].forEach((node, i) => node.setAttribute("aria-selected", i === at));
    if (at < 0) return list.removeAttribute("aria-activedescendant");
    list.setAttribute("aria-activedescendant", list.children[at].id);
    list.children[at].scrollIntoView({ block: "nearest", behavior: "instant" });
  };
  const choose = (next) => {
    state.set("region", next);
    if (!next.length) return tellStrips([]);
    if (listed.length && !listed.includes(state.get("selected"))) state.set("selected", listed[0]);
    tellStrips(rowsIn(next));
  };

  // ── Drawing again, from the outermost that changed ──
  const measureUp = () => {
    width = Math.max(260, stage.clientWidth);
    height = clamp(Math.round(0.66 * width), 280, 420);
    stage.style.height = `${height}px`;
  };
  const overlay = () => (placeHandles(), placeRegion(), placeDot("selected"), placeDot("hovered"));
  const redraw = () => {
    [x, y, kind] = [axisOf("x"), axisOf("y"), kindOf()];
    [sx, sy, looks] = [scaleOf(x), scaleOf(y), groupLooks(kind)];
    const hidden = new Set(state.get("hidden"));
    const mute = kind ? kind.names.map((name) => hidden.has(name)) : [false];
    shown = Uint8Array.from(
      x.values,
      (v, i) => !Number.isNaN(v) && !Number.isNaN(y.values[i]) && !(kind && mute[kind.index[i]]),
    );
    for (const select of choosers.querySelectorAll("select"))
      select.value = { x: x.key, y: y.key, by: kind?.key ?? "" }[select.dataset.axis];
    measureUp();
    drawFrame();
    drawPoints();
    count();
    overlay();
    showList();
    markLine();
  };
  const drawChips = () => {
    const now = kindOf();
    const own = groupLooks(now);
    const counts = (now?.names ?? []).map(() => 0);
    const hidden = state.get("hidden");
    for (const i of now?.index ?? []) counts[i]++;
    chips.replaceChildren(
      ...(now?.names ?? []).map((name, i) => {
        const chip = put(make("button", "opd-button opd-chip"), {
          type: "button",
          "aria-pressed": !hidden.includes(name),
          "data-name": name,
        });
        const mark = put(sprite(own[i], 2), { "aria-hidden": "true" });
        chip.append(
          mark,
          make("span", "", name),
          make("span", "opd-soft", counts[i].toLocaleString("en")),
        );
        chip.addEventListener("click", () =>
          state.set(
            "hidden",
            state.get("hidden").includes(name)
              ? state.get("hidden").filter((n) => n !== name)
              : [...state.get("hidden"), name],
          ),
        );
        return chip;
      }),
    );
  };

  // ── Hands ──
  const nearest = (event) => {
    const at = plot.getBoundingClientRect();
    const ex = event.clientX - at.left + LEFT;
    const ey = event.clientY - at.top + TOP;
    let best = -1;
    let gap = NEAR ** 2;
    for (let dx = -1; dx <= 1; dx++)
      for (let dy = -1; dy <= 1; dy++) {
        for (const i of cells.get(
          Math.floor(ex / NEAR) + dx + 4096 * (Math.floor(ey / NEAR) + dy),
        ) ?? []) {
          const d = (px[i] - ex) ** 2 + (py[i] - ey) ** 2;
          if (d < gap) [best, gap] = [i, d];
        }
      }
    return best;
  };
  const placesOf = (event) => {
    const at = plot.getBoundingClientRect();
    const along = (from, length) => clamp((from - PAD) / (length - 2 * PAD), 0, 1);
    return [along(event.clientX - at.left, at.width), 1 - along(event.clientY - at.top, at.height)];
  };
  const between = ([ax, ay], [bx, by]) => {
    const low = (a, b, axis, scale) =>
      Math.min(a, b) <= 0 ? axis.ends[0] : scale.of(Math.min(a, b));
    const high = (a, b, axis, scale) =>
      Math.max(a, b) >= 1 ? axis.ends[1] : scale.of(Math.max(a, b));
    return [low(ax, bx, x, sx), high(ax, bx, x, sx), low(ay, by, y, sy), high(ay, by, y, sy)];
  };
  let from = null;
  plot.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    plot.setPointerCapture(event.pointerId);
    from = placesOf(event);
  });
  plot.addEventListener("pointermove", (event) => {
    if (!from) return state.set("hovered", nearest(event));
    const [left, right, low, high] = between(from, placesOf(event));
    region.hidden = false;
    Object.assign(region.style, {
      left: `${toX(left) - LEFT}px`,
      top: `${toY(high) - TOP}px`,
      width: `${toX(right) - toX(left)}px`,
      height: `${toY(low) - toY(high)}px`,
    });
  });
  plot.addEventListener("pointerup", (event) => {
    if (!from) return;
    const to = placesOf(event);
    const moved = Math.hypot((to[0] - from[0]) * width, (to[1] - from[1]) * height) > 5;
    const start = from;
    from = null;
    if (moved) return choose(between(start, to));
    const row = nearest(event);
    if (row >= 0) state.set("selected", row);
    else choose([]);
    placeRegion();
  });
  plot.addEventListener("pointerleave", () => !from && state.set("hovered", -1));

  const quadrant = (q) => {
    const [atX, atY] = [sx.at(lineOf(x)), sy.at(lineOf(y))];
    const step = 1e-6;
    choose(
      between([q % 2 ? atX : 0, q < 2 ? atY : 0], [q % 2 ? 1 : atX - step, q < 2 ? 1 : atY - step]),
    );
  };
  cellsOf.forEach(({ title }, q) => title.addEventListener("click", () => quadrant(q)));
  const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
  plot.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const step = steps[event.key];
    const q = "1234".indexOf(event.key);
    if (!step && q < 0 && event.key !== "Escape") return;
    event.preventDefault();
    if (event.key === "Escape") return choose([]);
    if (q >= 0) return quadrant(q);
    const now = state.get("region");
    const [l, r, b, t] =
      now.length === 4
        ? [sx.at(now[0]), sx.at(now[1]), sy.at(now[2]), sy.at(now[3])]
        : [0.4, 0.6, 0.4, 0.6];
    const [dx, dy] = step.map((v) => v / 40);
    const grow = event.shiftKey;
    choose(
      between(
        [grow ? l : clamp(l + dx, 0, 1), grow ? b : clamp(b + dy, 0, 1)],
        [Math.max(l, clamp(r + dx, 0, 1)), Math.max(b, clamp(t + dy, 0, 1))],
      ),
    );
  });
  list.addEventListener("keydown", (event) => {
    const at = listed.indexOf(state.get("selected"));
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: listed.length - 1 }[event.key];
    if (to === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    state.set("selected", listed[clamp(to, 0, listed.length - 1)]);
  });
  list.addEventListener("click", (event) => {
    const row = event.target.closest("[data-row]")?.dataset.row;
    if (row !== undefined) state.set("selected", Number(row));
  });

  const setLine = (which, place) => {
    const axis = which === "x" ? x : y;
    const scale = which === "x" ? sx : sy;
    state.set("thresholds", {
      ...state.get("thresholds"),
      [axis.key]: scale.of(clamp(place, 0, 1)),
    });
  };
  for (const [which, node] of Object.entries(handles)) {
    let held = false;
    const along = (event) => placesOf(event)[which === "x" ? 0 : 1];
    node.addEventListener(
      "pointerdown",
      (event) => (
        (held = true),
        node.setPointerCapture(event.pointerId),
        event.preventDefault(),
        node.focus()
      ),
    );
    node.addEventListener("pointermove", (event) => held && setLine(which, along(event)));
    node.addEventListener("pointerup", () => (held = false));
    node.addEventListener("keydown", (event) => {
      const axis = which === "x" ? x : y;
      const scale = which === "x" ? sx : sy;
      const far = event.shiftKey ? 0.1 : 0.01;
      const way = {
        ArrowRight: far,
        ArrowUp: far,
        ArrowLeft: -far,
        ArrowDown: -far,
        PageUp: 0.1,
        PageDown: -0.1,
      }[event.key];
      if (
        (way === undefined && event.key !== "Home") ||
        event.ctrlKey ||
        event.metaKey ||
        event.altKey
      )
        return;
      event.preventDefault();
      if (event.key === "Home")
        state.set("thresholds", { ...state.get("thresholds"), [axis.key]: axis.start });
      else setLine(which, scale.at(lineOf(axis)) + way);
    });
  }

  // ── In step with the state ──
  const speak = (row) => {
    if (row < 0 || row >= size) return;
    spoken.textContent = `${wordOf(text, text.index[row])}, ${x.label} ${number(x.values[row])}, ${y.label} ${number(y.values[row])}`;
  };
  for (const name of ["x", "y"]) state.on(name, () => (state.set("region", []), redraw()));
  state.on("by", () => (state.set("hidden", []), drawChips(), redraw()));
  state.on("hidden", () => (drawChips(), redraw()));
  state.on("thresholds", () => (count(), placeHandles()));
  state.on("region", () => (placeRegion(), showList(), markLine()));
  state.on("selected", (row) => (placeDot("selected"), markLine(), speak(row)));
  state.on("hovered", () => placeDot("hovered"));
  drawChips();
  const watch = new ResizeObserver(
    () => stage.clientWidth && Math.abs(stage.clientWidth - width) > 1 && redraw(),
  );
  watch.observe(stage);
  redraw();
  return () => watch.disconnect();
});
