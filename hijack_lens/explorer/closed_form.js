// The two-layer model in closed form, as hijack_lens.theory has it: relative positions, every token a trigger.
//
// `values` are what the sliders say: repeats, length, distance; preference, log(pi_b(g|q) / pi_b(c|q)); and the
// strengths previous_token (b1), match (b2), copy (b3), bigram. Positions count from 1.

/** Neutral tokens, n times "q c", more neutral tokens, and "q", `distance` after the last repeat's q. */
export function promptOf({ repeats, length, distance }) {
  if (!repeats) return [...Array(length - 1).fill("·"), "q"];
  const pairs = Array(repeats).fill(["q", "c"]).flat();
  return [...Array(length + 1 - distance - 2 * repeats).fill("·"), ...pairs, ...Array(distance - 2).fill("·"), "q"];
}

/** How many repeats fit. */
export const mostRepeats = ({ length, distance }) => Math.floor((length + 1 - distance) / 2);

/** What the previous-token head attends to from a position, which has only itself before it if it is the first. */
export function previousTokenRow(position, { previous_token }) {
  const leak = position > 1 ? Math.exp(-previous_token) : 1;
  const total = 1 + leak * (position - 1);
  return Array.from({ length: position }, (_, s) => (s === position - 2 ? 1 : leak) / total);
}

/** What the induction head attends to from a position: by how strongly each remembers its token as the one before. */
export function inductionRow(tokens, position, { previous_token, match }) {
  const query = tokens[position - 1];
  const scores = [];
  for (let s = 1, count = 0; s <= position; s++) {
    count += tokens[s - 1] === query;
    const leak = s > 1 ? Math.exp(-previous_token) : 1;
    const before = s > 1 && tokens[s - 2] === query;
    scores.push((match * (leak * count + (1 - leak) * before)) / (1 + leak * (s - 1)));
  }
  const most = Math.max(...scores);
  const weights = scores.map((score) => Math.exp(score - most));
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  return weights.map((weight) => weight / total);
}

/** What the context adds to logit[c] - logit[g] at the prompt's end. */
export function contextPull(tokens, values) {
  const attended = { c: 0, g: 0, q: 0, "·": 0 };
  inductionRow(tokens, tokens.length, values).forEach((weight, s) => (attended[tokens[s]] += weight));
  return values.copy * (attended.c - attended.g);
}

/** The hijack margin, logit[c] - logit[g], by memory. */
export function marginOf(tokens, values) {
  const context = contextPull(tokens, values);
  const weights = -values.bigram * values.preference;
  return { context, weights, total: context + weights };
}

/** For 0, 1, 2, ... repeats, as many as fit: what the context pulls by. */
export function pulls(values) {
  const counts = Array.from({ length: mostRepeats(values) + 1 }, (_, repeats) => repeats);
  return counts.map((repeats) => contextPull(promptOf({ ...values, repeats }), values));
}

/** The repeats with which the context wins. */
export function winningRepeats(values) {
  const ahead = values.bigram * values.preference;
  return pulls(values).flatMap((pull, repeats) => (pull > ahead ? [repeats] : []));
}
