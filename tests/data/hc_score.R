# Makes hc_score.json: hc.score of R's fdrtool for p-values without ties.
library(fdrtool)
set.seed(1)
cases <- list()
for (E in c(2, 8, 60, 64)) for (sharp in c(1, 3, 8)) {
  p <- sort(runif(E)^sharp)
  cases[[length(cases) + 1]] <- sprintf('{"p": [%s], "score": [%s]}',
    paste(sprintf("%.17g", p), collapse = ", "),
    paste(sprintf("%.17g", hc.score(p)), collapse = ", "))
}
cat(sprintf('{"source": "R %s, fdrtool %s, hc.score",\n "cases": [\n%s]}\n',
  getRversion(), packageVersion("fdrtool"), paste(cases, collapse = ",\n")))
