// The small worlds of `toys.py` for the divergences of `generator.py`, so that a page without Python stays alive.

import { clamp } from "./core.js";

const logAdd = (a, b) =>
  a === -Infinity
    ? b
    : b === -Infinity
      ? a
      : Math.max(a, b) + Math.log1p(Math.exp(-Math.abs(a - b)));
const mixOf = (x, a, b) => logAdd(x + Math.log(a), Math.log(b)); // log(a u + b)
const sigmoid = (x) => 1 / (1 + Math.exp(-x));
const powerOf = (x, a) => (a ? Math.expm1(a * x) / a : x); // (u^a - 1) / a

const jsdForm = (b) => {
  const logM = (x) => mixOf(x, b, 1 - b);
  const logUM = (x) => -mixOf(-x, 1 - b, b);
  return {
    f: (x) => b * Math.exp(x) * logUM(x) - (1 - b) * logM(x),
    weight: (x) => (1 - b) * logM(x),
    centre: 0,
    curvature: b * (1 - b),
  };
};

// f(u) and w(u) = -f + u f' by x = log u, w at u = 1, and f''(1).
export const FORMS = {
  forward_kl: () => ({ f: (x) => Math.exp(x) * x, weight: Math.exp, centre: 1, curvature: 1 }),
  reverse_kl: () => ({ f: (x) => -x, weight: (x) => x - 1, centre: -1, curvature: 1 }),
  reverse_kl_k3: () => ({ f: (x) => Math.expm1(x) - x, weight: (x) => x, centre: 0, curvature: 1 }),
  jensen_shannon: () => jsdForm(0.5),
  generalized_jsd: jsdForm,
  total_variation: () => ({
    f: (x) => 0.5 * Math.abs(Math.expm1(x)),
    weight: (x) => 0.5 * Math.sign(x),
    centre: 0,
    curvature: Infinity,
  }),
  squared_hellinger: () => ({
    f: (x) => 0.5 * Math.expm1(x / 2) ** 2,
    weight: (x) => 0.5 * Math.expm1(x / 2),
    centre: 0,
    curvature: 0.25,
  }),
  pearson: () => ({
    f: (x) => Math.expm1(x) ** 2,
    weight: (x) => Math.expm1(2 * x),
    centre: 0,
    curvature: 2,
  }),
  neyman: () => ({
    f: (x) => -Math.expm1(x) * Math.expm1(-x),
    weight: (x) => -2 * Math.expm1(-x),
    centre: 0,
    curvature: 2,
  }),
  alpha_divergence: (a) => ({
    f: (x) => Math.exp(x) * powerOf(x, a - 1) - powerOf(x, a),
    weight: (x) => powerOf(x, a),
    centre: 0,
    curvature: 1,
  }),
  skew_forward_kl: (a) => {
    const logUM = (x) => -mixOf(-x, 1 - a, a);
    return {
      f: (x) => Math.exp(x) * logUM(x),
      weight: (x) => (1 - a) * Math.exp(logUM(x)),
      centre: 1 - a,
      curvature: (1 - a) ** 2,
    };
  },
  skew_reverse_kl: (a) => {
    const logM = (x) => mixOf(x, 1 - a, a);
    return {
      f: (x) => -logM(x),
      weight: (x) => logM(x) - 1 + a * Math.exp(-logM(x)),
      centre: a - 1,
      curvature: (1 - a) ** 2,
    };
  },
  jeffreys: () => ({
    f: (x) => Math.expm1(x) * x,
    weight: (x) => x + Math.expm1(x),
    centre: 0,
    curvature: 2,
  }),
  le_cam: () => ({
    f: (x) => Math.expm1(x) * Math.tanh(x / 2),
    weight: (x) => 4 * sigmoid(x) ** 2 - 1,
    centre: 0,
    curvature: 1,
  }),
};

const FAR = 50;
const RATE = 0.5;
const range = (n, low, high) =>
  Float64Array.from({ length: n }, (_, i) => low + ((high - low) * i) / (n - 1));
export const RATIOS = range(121, -6, 6);
export const SPACE = range(121, -6, 6);
export const HILLS = [
  [0.6, -2.5, 0.6],
  [0.4, 2.5, 0.8],
];
export const START = [0.6, 1];
export const CELLS = 10;
const total = (values) => values.reduce((a, b) => a + b, 0);
export const logSoftmax = (z) => {
  const top = Math.max(...z);
  const sum = Math.log(total(z.map((v) => Math.exp(v - top)))) + top;
  return z.map((v) => v - sum);
};

// A divergence by what it does to logits: gradient(logits, teacher) is -dD/dlogits.
export const pushOf = (name, parameter, clip) => {
  const form = FORMS[name](parameter);
  const weight = (x) => {
    const w = form.weight(clamp(x, -FAR, FAR)) - form.centre;
    return clip ? clamp(w, -clip, clip) : w;
  };
  const gradient = (logits, teacher) => {
    const student = logSoftmax(logits);
    const p = student.map(Math.exp);
    const w = student.map((s, k) => weight(teacher[k] - s));
    const mean = total(p.map((v, k) => v * w[k]));
    return p.map((v, k) => v * (w[k] - mean));
  };
  return {
    name,
    form,
    weight,
    gradient,
    rate: Number.isFinite(form.curvature) && form.curvature > 0 ? RATE / form.curvature : RATE,
  };
};

export const pullsOf = (push, mass) =>
  RATIOS.map((x) => {
    const p = mass * Math.exp(-x);
    return p < 1 - 1e-9
      ? push.gradient([Math.log(p), Math.log1p(-p)], [Math.log(mass), Math.log1p(-mass)])[0]
      : NaN;
  });

export const students = () => {
  const out = [];
  for (let i = 0; i <= CELLS; i++)
    for (let j = 0; j <= CELLS - i; j++)
      out.push([i, j, CELLS - i - j].map((k) => (k * 0.94) / CELLS + 0.02));
  return out;
};
export const tempered = (logits, temperature) => logSoftmax(logits.map((v) => v / temperature));
const moveOf = (p, g) => {
  const mean = total(p.map((v, k) => v * g[k]));
  return p.map((v, k) => v * (g[k] - mean));
};
export const fieldOf = (push, teacher, temperature) => {
  const q = tempered(teacher.map(Math.log), temperature);
  return students().map((p) => moveOf(p, push.gradient(p.map(Math.log), q)));
};
export const walkOf = (push, student, teacher, steps, temperature) => {
  const q = tempered(teacher.map(Math.log), temperature);
  const out = [student];
  let z = student.map(Math.log);
  for (let i = 0; i < steps; i++) {
    const g = push.gradient(z, q);
    z = z.map((v, k) => v + push.rate * g[k]);
    out.push(logSoftmax(z).map(Math.exp));
  }
  return out;
};

export const bell = (at, width) => [...SPACE].map((x) => -(((x - at) / width) ** 2) / 2);
export const hillsOf = (temperature) =>
  tempered(
    [...SPACE].map((x) =>
      Math.log(
        total(
          HILLS.map(
            ([share, at, width]) => (share * Math.exp(-(((x - at) / width) ** 2) / 2)) / width,
          ),
        ),
      ),
    ),
    temperature,
  );
export const fitHills = (push, steps, temperature) => {
  const teacher = hillsOf(temperature);
  let [at, width] = START;
  let spread = Math.log(width);
  for (let i = 0; i < steps; i++) {
    width = Math.exp(spread);
    const g = push.gradient(bell(at, width), teacher);
    const z = [...SPACE].map((x) => (x - at) / width);
    at += clamp(push.rate * 0.2 * width * total(g.map((v, k) => v * z[k])), -0.3, 0.3);
    spread = clamp(
      spread + clamp(push.rate * 0.1 * total(g.map((v, k) => v * z[k] ** 2)), -0.2, 0.2),
      Math.log(0.15),
      Math.log(6),
    );
  }
  return [at, Math.exp(spread)];
};
