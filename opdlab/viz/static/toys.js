// The small worlds of `toys.py` for the divergences of `losses/generators.py`, so that a page
// without Python stays alive. The tests hold both languages to the same numbers.
//
// A loss is an f-divergence of u = teacher / student, written with x = log u.

import { clamp, sum } from "./core.js";

/**
 * The generator of a divergence: f(u) and w(u) = -f + u f' at x = log u, w at u = 1, and f''(1).
 * @typedef {object} Form
 * @property {(x: number) => number} f
 * @property {(x: number) => number} weight
 * @property {number} centre
 * @property {number} curvature
 *
 * What a loss does to logits: the weight of each token, and the push -dD/dlogits.
 * @typedef {object} Push
 * @property {string} name
 * @property {(x: number) => number} weight
 * @property {(logits: number[], teacher: number[]) => number[]} gradient
 * @property {number} rate step size, so that losses of different curvature walk alike
 */

// ── Divergences ──────────────────────────────────────────────────────────────────────────────────

// log(exp(a) + exp(b))
/** @param {number} a @param {number} b */
const logAdd = (a, b) => {
  if (a === -Infinity) return b;
  if (b === -Infinity) return a;
  return Math.max(a, b) + Math.log1p(Math.exp(-Math.abs(a - b)));
};

// log(a u + b)
/** @param {number} x @param {number} a @param {number} b */
const logMix = (x, a, b) => logAdd(x + Math.log(a), Math.log(b));

/** @param {number} x */
const sigmoid = (x) => 1 / (1 + Math.exp(-x));

// (u^a - 1) / a
/** @param {number} x @param {number} a */
const powerOf = (x, a) => (a ? Math.expm1(a * x) / a : x);

/** @param {number} b @returns {Form} */
const jsdForm = (b) => {
  const logM = (/** @type {number} */ x) => logMix(x, b, 1 - b);
  const logUM = (/** @type {number} */ x) => -logMix(-x, 1 - b, b);
  return {
    f: (x) => b * Math.exp(x) * logUM(x) - (1 - b) * logM(x),
    weight: (x) => (1 - b) * logM(x),
    centre: 0,
    curvature: b * (1 - b),
  };
};

/** @type {Record<string, (parameter: number) => Form>} */
export const FORMS = {
  forward_kl: () => ({ f: (x) => Math.exp(x) * x, weight: Math.exp, centre: 1, curvature: 1 }),
  reverse_kl: () => ({ f: (x) => -x, weight: (x) => x - 1, centre: -1, curvature: 1 }),
  reverse_kl_k3: () => ({
    f: (x) => Math.expm1(x) - x,
    weight: (x) => x,
    centre: 0,
    curvature: 1,
  }),
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
    const logUM = (/** @type {number} */ x) => -logMix(-x, 1 - a, a);
    return {
      f: (x) => Math.exp(x) * logUM(x),
      weight: (x) => (1 - a) * Math.exp(logUM(x)),
      centre: 1 - a,
      curvature: (1 - a) ** 2,
    };
  },
  skew_reverse_kl: (a) => {
    const logM = (/** @type {number} */ x) => logMix(x, 1 - a, a);
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

const FARTHEST = 50; // |x| beyond which the weight is held
const RATE = 0.5;

/** @param {number[]} logits */
export const logSoftmax = (logits) => {
  const top = Math.max(...logits);
  const norm = Math.log(sum(logits.map((logit) => Math.exp(logit - top)))) + top;
  return logits.map((logit) => logit - norm);
};

/** @param {number[]} logits @param {number} temperature */
export const tempered = (logits, temperature) =>
  logSoftmax(logits.map((logit) => logit / temperature));

/** @param {number[]} p @param {number[]} values */
const meanUnder = (p, values) => sum(p.map((share, k) => share * values[k]));

/**
 * Return what a divergence does to logits.
 * @param {string} name
 * @param {number} parameter
 * @param {number} clip largest weight; 0 for none
 * @returns {Push}
 */
export const pushOf = (name, parameter, clip) => {
  const { weight: raw, centre, curvature } = FORMS[name](parameter);
  const weight = (/** @type {number} */ x) => {
    const w = raw(clamp(x, -FARTHEST, FARTHEST)) - centre;
    return clip ? clamp(w, -clip, clip) : w;
  };
  /** @type {Push["gradient"]} */
  const gradient = (logits, teacher) => {
    const student = logSoftmax(logits);
    const p = student.map(Math.exp);
    const w = student.map((log, k) => weight(teacher[k] - log));
    const mean = meanUnder(p, w);
    return p.map((share, k) => share * (w[k] - mean));
  };
  const isSmooth = Number.isFinite(curvature) && curvature > 0;
  return { name, weight, gradient, rate: isSmooth ? RATE / curvature : RATE };
};

/** @param {number} count @param {number} low @param {number} high */
const spaced = (count, low, high) =>
  Array.from({ length: count }, (_, i) => low + ((high - low) * i) / (count - 1));

// ── One token against all others ─────────────────────────────────────────────────────────────────

export const RATIOS = spaced(121, -6, 6);

/**
 * Return the push on a token's logit at each of RATIOS, where the teacher gives the token `mass`.
 * @param {Push} push
 * @param {number} mass
 */
export const pullsOf = (push, mass) =>
  RATIOS.map((x) => {
    const p = mass * Math.exp(-x);
    if (p >= 1 - 1e-9) return NaN;
    const teacher = [Math.log(mass), Math.log1p(-mass)];
    return push.gradient([Math.log(p), Math.log1p(-p)], teacher)[0];
  });

// ── Three outcomes ───────────────────────────────────────────────────────────────────────────────

const CELLS = 10; // students along an edge of the triangle, less one

export const students = () => {
  /** @type {number[][]} */
  const all = [];
  for (let i = 0; i <= CELLS; i++) {
    for (let j = 0; j <= CELLS - i; j++) {
      all.push([i, j, CELLS - i - j].map((k) => (k * 0.94) / CELLS + 0.02));
    }
  }
  return all;
};

/**
 * Return how each of `students` moves at first.
 * @param {Push} push
 * @param {number[]} teacher
 * @param {number} temperature
 */
export const fieldOf = (push, teacher, temperature) => {
  const q = tempered(teacher.map(Math.log), temperature);
  return students().map((p) => {
    const gradient = push.gradient(p.map(Math.log), q);
    const mean = meanUnder(p, gradient);
    return p.map((share, k) => share * (gradient[k] - mean));
  });
};

/**
 * Return where a student is after each of some steps.
 * @param {Push} push
 * @param {number[]} student
 * @param {number[]} teacher
 * @param {number} steps
 * @param {number} temperature
 */
export const walkOf = (push, student, teacher, steps, temperature) => {
  const q = tempered(teacher.map(Math.log), temperature);
  const walk = [student];
  let logits = student.map(Math.log);
  for (let i = 0; i < steps; i++) {
    const gradient = push.gradient(logits, q);
    logits = logits.map((logit, k) => logit + push.rate * gradient[k]);
    walk.push(logSoftmax(logits).map(Math.exp));
  }
  return walk;
};

// ── Two hills and one Gaussian ───────────────────────────────────────────────────────────────────

export const SPACE = spaced(121, -6, 6);
/** The teacher's hills: share, centre, width. */
const HILLS = [
  [0.6, -2.5, 0.6],
  [0.4, 2.5, 0.8],
];
/** @type {[centre: number, width: number]} */
export const START = [0.6, 1];

/** @param {number} centre @param {number} width */
export const bell = (centre, width) => SPACE.map((x) => -(((x - centre) / width) ** 2) / 2);

/** @param {number} temperature */
export const hillsOf = (temperature) => {
  const density = (/** @type {number} */ x) =>
    sum(
      HILLS.map(([share, centre, width]) => {
        return (share * Math.exp(-(((x - centre) / width) ** 2) / 2)) / width;
      }),
    );
  return tempered(
    SPACE.map((x) => Math.log(density(x))),
    temperature,
  );
};

/**
 * Return centre and width of the Gaussian after some steps.
 * @param {Push} push
 * @param {number} steps
 * @param {number} temperature
 * @returns {[centre: number, width: number]}
 */
export const fitHills = (push, steps, temperature) => {
  const teacher = hillsOf(temperature);
  let [centre, width] = START;
  let spread = Math.log(width);
  for (let i = 0; i < steps; i++) {
    width = Math.exp(spread);
    const gradient = push.gradient(bell(centre, width), teacher);
    const z = SPACE.map((x) => (x - centre) / width);
    const pull = sum(gradient.map((slope, k) => slope * z[k]));
    const widening = sum(gradient.map((slope, k) => slope * z[k] ** 2));
    centre += clamp(push.rate * 0.2 * width * pull, -0.3, 0.3);
    const wider = spread + clamp(push.rate * 0.1 * widening, -0.2, 0.2);
    spread = clamp(wider, Math.log(0.15), Math.log(6));
  }
  return [centre, Math.exp(spread)];
};
