// Sphinx's scores, with how-to pages before the reference, and the members of classes last: each result has its `save`.
var Scorer = {
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
  score: ([page, , , kind, score]) => {
    if (page.startsWith("how-to/")) return score + (score >= Scorer.title ? 20 : 3);
    return /^Python (attribute|method|property)/.test(kind ?? "") ? score - 12 : score;
  },
};
