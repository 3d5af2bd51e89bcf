/* The formulas of docs/explorer.html: kto.py and dpo_variants.py, once more and in JavaScript.

   c   log pi(y|x) - log pi_ref(y|x) of the chosen (desirable) reply, in nats
   r   the same of the rejected (undesirable) reply
   h   c - r, the margin
   p   the settings: an object with the argument names of the Python functions

   OBJECTIVES[name] has
     settings      the settings and their defaults, as in the Python signature
     start         settings of the embedded world's runs, where they differ: here the page begins
     loss(c, r, p) a number
     slope(c, r, p) [dL/dc, dL/dr], derived by hand
   An objective of thumbs (family "thumbs") sees a batch of two: c with a thumb up, r with a thumb
   down; its loss is the mean of the two. tests/test_explorer.py compares all of this with Python.
*/
"use strict";

/** log sigma(t), also where sigma(t) is 0 in floating point. */
function logSigma(t) {
  return Math.min(t, 0) - Math.log1p(Math.exp(-Math.abs(t)));
}

/** sigma(t) = 1 / (1 + e^-t). */
function sigma(t) {
  return Math.exp(logSigma(t));
}

/** sigma'(t) = sigma(t) sigma(-t). */
function sigmaSlope(t) {
  return Math.exp(logSigma(t) + logSigma(-t));
}

/** An objective that sees only u = beta h is one curve of u and the slope of this curve. */
function ofMargin(curve, curveSlope) {
  return {
    loss: (c, r, p) => curve(p.beta * (c - r), p),
    slope: (c, r, p) => {
      const push = p.beta * curveSlope(p.beta * (c - r), p);
      return [push, -push];
    },
  };
}

/** An objective that puts each reply on a curve of its own. */
function separate(ofChosen, chosenSlope, ofRejected, rejectedSlope) {
  return {
    loss: (c, r, p) => ofChosen(c, p) + ofRejected(r, p),
    slope: (c, r, p) => [chosenSlope(c, p), rejectedSlope(r, p)],
  };
}

/** f' of fdpo's divergence at u = e^t, up to a constant; and its derivative by t. */
function divergenceScore(t, p) {
  const alpha = { reverse_kl: 0, forward_kl: 1, alpha: p.alpha }[p.divergence];
  if (p.divergence === "js") return [logSigma(t), sigma(-t)];
  if (alpha === 0) return [t, 1];
  return [-Math.expm1(-alpha * t) / alpha, Math.exp(-alpha * t)];
}

const OBJECTIVES = {
  // --- thumbs: one reply, liked or not ---------------------------------------------------------
  kto: {
    family: "thumbs",
    equation: "½ λ_D (1 − σ(β(c − z_0))) + ½ λ_U (1 − σ(β(z_0 − r)))",
    idea: ["Each thumb by itself. The push fades on both sides of the reference point z_0: "
           + "what is clearly good, or hopeless, is left alone.",
           "每个标注各自计算。离参考点 z_0 越远，梯度越小：已经很好的和没有希望的都不再推动。"],
    settings: { beta: 0.1, lambda_d: 1, lambda_u: 1, z0: 0 },
    start: { beta: 0.5 },
    ...separate((c, p) => p.lambda_d * sigma(-p.beta * (c - p.z0)) / 2,
                (c, p) => -p.lambda_d * p.beta * sigmaSlope(p.beta * (c - p.z0)) / 2,
                (r, p) => p.lambda_u * sigma(p.beta * (r - p.z0)) / 2,
                (r, p) => p.lambda_u * p.beta * sigmaSlope(p.beta * (r - p.z0)) / 2),
  },
  apo_zero_unpaired: {
    family: "thumbs",
    equation: "½ (1 − σ(βc)) + ½ σ(βr)",
    idea: ["KTO with the reference model itself as the reference point: z_0 = 0.",
           "以参考模型本身为参考点的 KTO：z_0 = 0。"],
    settings: { beta: 0.1 },
    start: { beta: 0.5 },
    ...separate((c, p) => sigma(-p.beta * c) / 2,
                (c, p) => -p.beta * sigmaSlope(p.beta * c) / 2,
                (r, p) => sigma(p.beta * r) / 2,
                (r, p) => p.beta * sigmaSlope(p.beta * r) / 2),
  },
  bco: {
    family: "thumbs",
    equation: "−½ log σ(βc − δ) − ½ log σ(δ − βr)",
    idea: ["A classifier of good and bad with βr as its logit. Unlike KTO it never gives up: "
           + "a badly wrong reply has the full slope.",
           "以 βr 为 logit 的好坏分类器。与 KTO 不同，它从不放弃：错得厉害的回答斜率最大。"],
    settings: { beta: 0.1, reward_shift: 0 },
    start: { beta: 0.5 },
    ...separate((c, p) => -logSigma(p.beta * c - p.reward_shift) / 2,
                (c, p) => -p.beta * sigma(p.reward_shift - p.beta * c) / 2,
                (r, p) => -logSigma(p.reward_shift - p.beta * r) / 2,
                (r, p) => p.beta * sigma(p.beta * r - p.reward_shift) / 2),
  },

  // --- pairs, a curve on the margin ------------------------------------------------------------
  dpo: {
    family: "margin",
    equation: "−log σ(β(c − r))",
    idea: ["Only the margin c − r counts, so the shades are stripes. Nothing stops both "
           + "replies from falling together.",
           "只看间隔 c − r，所以地形是条纹。没有任何东西阻止两条回答一起下降。"],
    settings: { beta: 0.1 },
    start: { beta: 0.5 },
    ...ofMargin(u => -logSigma(u), u => -sigma(-u)),
  },
  cdpo: {
    family: "margin",
    equation: "−(1 − ε) log σ(βh) − ε log σ(−βh)",
    idea: ["Expects a share ε of the labels to be wrong, and stops at a finite margin.",
           "假定有比例 ε 的标签是错的，因此停在有限的间隔上。"],
    settings: { beta: 0.1, label_smoothing: 0.1 },
    start: { beta: 0.5 },
    ...ofMargin((u, p) => -(1 - p.label_smoothing) * logSigma(u) - p.label_smoothing * logSigma(-u),
                (u, p) => p.label_smoothing * sigma(u) - (1 - p.label_smoothing) * sigma(-u)),
  },
  rdpo: {
    family: "margin",
    equation: "[−(1 − ε) log σ(βh) + ε log σ(−βh)] / (1 − 2ε)",
    idea: ["Subtracts what flipped labels add: its mean is the clean DPO loss. It never "
           + "levels out.",
           "减去翻转标签带来的部分：均值就是干净的 DPO 损失。它永远不会变平。"],
    settings: { beta: 0.1, label_smoothing: 0.1 },
    start: { beta: 1 },
    ...ofMargin((u, p) => (p.label_smoothing * logSigma(-u) - (1 - p.label_smoothing) * logSigma(u))
                          / (1 - 2 * p.label_smoothing),
                (u, p) => -sigma(-u) - p.label_smoothing / (1 - 2 * p.label_smoothing)),
  },
  ipo: {
    family: "margin",
    equation: "(c − r − 1/(2τ))^2",
    idea: ["A target for the margin, 1/(2τ) nats; whoever overshoots is pulled back.",
           "给间隔定一个目标，1/(2τ) 奈特；超过了会被拉回来。"],
    settings: { tau: 0.1 },
    loss: (c, r, p) => (c - r - 1 / (2 * p.tau)) ** 2,
    slope: (c, r, p) => {
      const push = 2 * (c - r - 1 / (2 * p.tau));
      return [push, -push];
    },
  },
  hinge: {
    family: "margin",
    equation: "max(0, 1 − βh)",
    idea: ["A support vector machine: full push up to a margin of 1/β, then none at all.",
           "支持向量机：间隔到 1/β 之前全力推动，之后完全不动。"],
    settings: { beta: 0.05 },
    start: { beta: 0.5 },
    ...ofMargin(u => Math.max(0, 1 - u), u => -Number(u < 1)),
  },
  exo: {
    family: "margin",
    equation: "KL(p ‖ q),  p = (σ(βh), σ(−βh)),  q = (1 − ε, ε)",
    idea: ["The KL the other way round. Pairs that are badly wrong are given up.",
           "把 KL 反过来。错得太厉害的偏好对会被放弃。"],
    settings: { beta: 0.1, label_smoothing: 1e-3 },
    start: { beta: 1 },
    ...ofMargin((u, p) => sigma(u) * (logSigma(u) - Math.log1p(-p.label_smoothing))
                          + sigma(-u) * (logSigma(-u) - Math.log(p.label_smoothing)),
                (u, p) => sigmaSlope(u)
                          * (u - Math.log1p(-p.label_smoothing) + Math.log(p.label_smoothing))),
  },
  discopop: {
    family: "margin",
    equation: "−log σ(u) σ(−u/τ) + e^{−u} σ(u/τ),  u = βh",
    idea: ["Found by a language model. Around the start it pushes the wrong way: look for the "
           + "little hollow at h = 0.",
           "由语言模型发现。在起点附近它推错方向：看 h = 0 处的小坑。"],
    settings: { beta: 0.05, tau: 0.05 },
    start: { beta: 1 },
    ...ofMargin((u, p) => -logSigma(u) * sigma(-u / p.tau) + Math.exp(logSigma(u / p.tau) - u),
                (u, p) => -sigma(-u) * sigma(-u / p.tau)
                          + logSigma(u) * sigmaSlope(u / p.tau) / p.tau
                          + Math.exp(logSigma(u / p.tau) - u) * (sigma(-u / p.tau) / p.tau - 1)),
  },
  odpo: {
    family: "margin",
    equation: "−log σ(βh − α log g),  g = score gap",
    idea: ["DPO with an offset: a pair that is far apart in score must get further apart.",
           "带偏移的 DPO：分数差得多的一对，间隔也必须更大。"],
    settings: { score_gap: 4, beta: 0.5, alpha: 1 },
    ...ofMargin((u, p) => -logSigma(u - p.alpha * Math.log(p.score_gap)),
                (u, p) => -sigma(p.alpha * Math.log(p.score_gap) - u)),
  },
  fdpo: {
    family: "margin",
    equation: "−log σ(β(f′(e^c) − f′(e^r)))",
    idea: ["Another distance than the reverse KL. With js or forward_kl the interest in c "
           + "fades once it is above 0.",
           "换成别的散度。用 js 或 forward_kl 时，c 超过 0 之后就不再受重视。"],
    settings: { beta: 0.1, divergence: "js", alpha: 0.5 },
    start: { beta: 1 },
    loss: (c, r, p) => -logSigma(p.beta * (divergenceScore(c, p)[0] - divergenceScore(r, p)[0])),
    slope: (c, r, p) => {
      const [chosen, chosenSlope] = divergenceScore(c, p);
      const [rejected, rejectedSlope] = divergenceScore(r, p);
      const push = -p.beta * sigma(-p.beta * (chosen - rejected));
      return [push * chosenSlope, -push * rejectedSlope];
    },
  },

  // --- pairs, each reply against an anchor -----------------------------------------------------
  dpop: {
    family: "anchor",
    equation: "−log σ(β(h − λ max(0, −c)))",
    idea: ["DPO with a wall: each nat that the chosen reply falls below the reference costs λ.",
           "加了一道墙的 DPO：可取回答每低于参考模型一奈特，就要付出 λ。"],
    settings: { beta: 0.3, lam: 50 },
    start: { beta: 0.5, lam: 0.5 },
    loss: (c, r, p) => -logSigma(p.beta * (c - r - p.lam * Math.max(0, -c))),
    slope: (c, r, p) => {
      const push = -p.beta * sigma(-p.beta * (c - r - p.lam * Math.max(0, -c)));
      return [push * (1 + p.lam * Number(c < 0)), -push];
    },
  },
  nca: {
    family: "anchor",
    equation: "−log σ(βc) − ½ log σ(−βc) − ½ log σ(−βr)",
    idea: ["Holds the chosen reply at a finite height: above log(2)/β nats it is pushed down.",
           "把可取回答留在有限的高度：超过 log(2)/β 奈特就会被压下来。"],
    settings: { beta: 0.01 },
    start: { beta: 0.1 },
    ...separate((c, p) => -logSigma(p.beta * c) - logSigma(-p.beta * c) / 2,
                (c, p) => p.beta * (sigma(p.beta * c) / 2 - sigma(-p.beta * c)),
                (r, p) => -logSigma(-p.beta * r) / 2,
                (r, p) => p.beta * sigma(p.beta * r) / 2),
  },
  bco_pair: {
    family: "anchor",
    equation: "−log σ(βc − δ) − log σ(δ − βr)",
    idea: ["The two replies of a pair, each told good or bad by the same classifier.",
           "一对中的两条回答，由同一个分类器各自判断好坏。"],
    settings: { beta: 0.1, reward_shift: 0 },
    start: { beta: 0.5 },
    ...separate((c, p) => -logSigma(p.beta * c - p.reward_shift),
                (c, p) => -p.beta * sigma(p.reward_shift - p.beta * c),
                (r, p) => -logSigma(p.reward_shift - p.beta * r),
                (r, p) => p.beta * sigma(p.beta * r - p.reward_shift)),
  },
  apo_zero: {
    family: "anchor",
    equation: "σ(−βc) + σ(βr)",
    idea: ["The chosen one up, the rejected one down, each against the reference model.",
           "可取的向上，不可取的向下，各自与参考模型相比。"],
    settings: { beta: 0.1 },
    start: { beta: 0.5 },
    ...separate((c, p) => sigma(-p.beta * c),
                (c, p) => -p.beta * sigmaSlope(p.beta * c),
                (r, p) => sigma(p.beta * r),
                (r, p) => p.beta * sigmaSlope(p.beta * r)),
  },
  apo_down: {
    family: "anchor",
    equation: "σ(βc) + σ(−β(c − r))",
    idea: ["For chosen replies worse than what the model writes: both go down, on purpose.",
           "用于可取回答还不如模型自己写的情形：故意让两条都下降。"],
    settings: { beta: 0.1 },
    start: { beta: 0.5 },
    loss: (c, r, p) => sigma(p.beta * c) + sigma(-p.beta * (c - r)),
    slope: (c, r, p) => {
      const gap = p.beta * sigmaSlope(p.beta * (c - r));
      return [p.beta * sigmaSlope(p.beta * c) - gap, gap];
    },
  },
  sppo: {
    family: "anchor",
    equation: "(c − (P_w − ½)/β)^2 + (r − (P_l − ½)/β)^2",
    idea: ["A target for each reply, set by how often it wins. The landscape is a bowl.",
           "按胜率给每条回答一个目标。地形是一只碗。"],
    settings: { chosen_win_prob: 0.8, rejected_win_prob: 0.3, beta: 1e-3 },
    start: { beta: 0.05 },
    ...separate((c, p) => (c - (p.chosen_win_prob - 0.5) / p.beta) ** 2,
                (c, p) => 2 * (c - (p.chosen_win_prob - 0.5) / p.beta),
                (r, p) => (r - (p.rejected_win_prob - 0.5) / p.beta) ** 2,
                (r, p) => 2 * (r - (p.rejected_win_prob - 0.5) / p.beta)),
  },
  sppo_hard: {
    family: "anchor",
    equation: "(c − 1/(2β))^2 + (r + 1/(2β))^2",
    idea: ["SPPO from bare labels: the winner always wins. The targets are ±1/(2β) nats.",
           "只用标签的 SPPO：赢家永远赢。目标是 ±1/(2β) 奈特。"],
    settings: { beta: 1e-3 },
    start: { beta: 0.05 },
    ...separate((c, p) => (c - 1 / (2 * p.beta)) ** 2,
                (c, p) => 2 * (c - 1 / (2 * p.beta)),
                (r, p) => (r + 1 / (2 * p.beta)) ** 2,
                (r, p) => 2 * (r + 1 / (2 * p.beta))),
  },
};

// --- six answers: exact optima over all policies, ref_y the reference's probabilities -----------

/** q after a share `flip` of all judgements is reversed. */
function flipped(q, flip) {
  return flip + (1 - 2 * flip) * q;
}

function normalise(weights) {
  const total = weights.reduce((a, b) => a + b, 0);
  return weights.map(weight => weight / total);
}

/** KTO's optimum at a constant z0; balance_y = lambda_d q_y - lambda_u (1 - q_y).

    With r = log pi/ref, the derivative by pi is one number nu for every answer that is left:
    balance beta sigma'(beta (r - z0)) e^-r = nu. Newton's method finds r for a given nu, bisection
    the nu whose probabilities sum to 1. Beyond beta = 1 an answer that is liked only a little may
    have to be given up: the smallest balances leave first. As world.kto_logratios. */
function ktoOptimum(ref, balance, beta, z0) {
  const level = r => Math.log(beta) + logSigma(beta * (r - z0)) + logSigma(-beta * (r - z0)) - r;
  const logratio = target => {
    let r = (Math.log(beta) + beta * z0 - target) / (1 + beta);
    for (let i = 0; i < 200; i++) {
      const fall = Math.max(1 + beta * Math.tanh(beta * (r - z0) / 2), 1e-15);
      const step = (target - level(r)) / fall;
      if (step <= 1e-14 * (1 + Math.abs(r))) break;
      r -= step;
    }
    return r;
  };
  const policy = (logNu, least) => ref.map((share, y) => balance[y] < least ? 0
    : share * Math.exp(logratio(logNu - Math.log(balance[y]))));
  const mass = (logNu, least) => policy(logNu, least).reduce((a, b) => a + b, 0);

  let top = Infinity;
  if (beta === 1) top = -z0;
  if (beta > 1) top = level(z0 + Math.log(beta - 1) / beta);
  const liked = balance.filter(b => b > 0).sort((a, b) => a - b);
  if (!liked.length) return ref.map(() => NaN);            // nothing is liked: there is no optimum
  const least = liked.find(b => beta < 1 || mass(Math.log(b) + top, b) <= 1)
    ?? liked[liked.length - 1];
  const alive = ref.filter((_, y) => balance[y] >= least).reduce((a, b) => a + b, 0);
  let low = Math.log(least) + level(-Math.log(alive));
  let high = Math.min(Math.log(liked[liked.length - 1]) + level(-Math.log(alive)),
                      Math.log(least) + top);
  for (let i = 0; i < 60; i++) {
    const middle = (low + high) / 2;
    if (mass(middle, least) > 1) low = middle; else high = middle;
  }
  return normalise(policy(high, least));
}

/** KTO's optimum where z0 is the policy's own KL: solve, measure the KL, solve again. */
function ktoFixedPoint(ref, balance, beta) {
  let policy = ktoOptimum(ref, balance, beta, 0);
  for (let i = 0; i < 200; i++) {
    const next = ktoOptimum(ref, balance, beta, klBetween(policy, ref));
    const moved = Math.max(...next.map((p, y) => Math.abs(p - policy[y])));
    policy = next;
    if (moved < 1e-10) break;
  }
  return policy;
}

/** KL(policy || ref) in nats. */
function klBetween(policy, ref) {
  return policy.reduce((sum, p, y) => sum + (p > 0 ? p * Math.log(p / ref[y]) : 0), 0);
}

/** beats[y][z]: the annotator prefers y to z, Bradley-Terry with utility logit(q). */
function preferences(q, flip) {
  const utility = q.map(share => Math.log(share / (1 - share)));
  return utility.map(u => utility.map(v => flipped(sigma(u - v), flip)));
}

/** DPO's optimum for any preference table: ref * strength^(1/beta).

    The strengths are the maximum-likelihood fit of Bradley-Terry to the pairs, by Zermelo's
    iteration: strength = wins / sum over opponents of meetings / (own + opponent's strength).
    cDPO (sign +1) reads the table smoothed by eps, rDPO (sign -1) the table with eps taken out. */
function pairOptimum(ref, beats, beta, eps = 0, sign = 1) {
  const scale = sign > 0 ? 1 : 1 / (1 - 2 * eps);
  const wins = ref.map((p, y) => ref.map((q, z) =>
    p * q * scale * ((1 - eps) * beats[y][z] + sign * eps * beats[z][y])));
  let strength = ref.map(() => 1);
  for (let round = 0; round < 2000; round++) {
    const next = normalise(strength.map((own, y) => {
      let won = 0, meetings = 0;
      for (let z = 0; z < ref.length; z++) {
        if (z === y) continue;
        won += wins[y][z];
        meetings += (wins[y][z] + wins[z][y]) / (own + strength[z]);
      }
      return won / meetings;
    }));
    const moved = Math.max(...next.map((s, y) => Math.abs(s / strength[y] - 1)));
    strength = next;
    if (moved < 1e-13) break;
  }
  const largest = Math.max(...strength);
  return normalise(ref.map((p, y) => p * (strength[y] / largest) ** (1 / beta)));
}

/** IPO's optimum: ref exp(P(y beats a reply of the reference) / tau). */
function ipoOptimum(ref, beats, tau) {
  const chance = ref.map((_, y) => ref.reduce((sum, p, z) => sum + p * beats[y][z], 0));
  const best = Math.max(...chance);
  return normalise(ref.map((p, y) => p * Math.exp((chance[y] - best) / tau)));
}
