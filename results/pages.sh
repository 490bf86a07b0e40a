#!/bin/sh
# Every page, figure and CSV of this folder that is made of records here, anew, into the folders of their sweeps:
# `sh results/pages.sh` in the checkout's root (pip install -e '.[plots]').
set -eu
tables() { domainbed-sfp collect --input_dir "results/$1" --output "results/$1/README.md"; }
by_validation() { # sweep, page or figure, what it shows ...
  sweep=$1 page=$2
  shift 2
  domainbed-sfp collect --input_dir "results/$sweep" --selection training-domain --output "results/$sweep/$page" "$@"
}

for sweep in ablations closed_digits coloured coloured_70 coloured_digits coloured_digits_search coloured_fresh coloured_search \
  globalpru_coloured globalpru_small pacs_128 pacs_small recipe_pacs recipe_stamped_pacs stamped_pacs_128 quantization_digits quantization_small sparsity_curves sparsity_curves_pacs; do
  tables $sweep
done

by_validation closed_digits SFP.md --compare SFP best
by_validation coloured SFP.md --compare SFP best --exclude SFP SFPWeighted
by_validation coloured SFPWeighted.md --compare SFPWeighted best --exclude SFP SFPWeighted
by_validation coloured_70 SFP.md --compare SFP best --exclude SFP SFPWeighted
by_validation coloured_70 SFPWeighted.md --compare SFPWeighted best --exclude SFP SFPWeighted
by_validation coloured_fresh SFP.md --compare SFP
by_validation coloured_fresh SFPWeighted.md --compare SFPWeighted
by_validation coloured_digits_search SFP.md --compare SFP --exclude SFPWeighted
by_validation coloured_digits_search chosen.md --chosen
by_validation coloured_search chosen.md --chosen
by_validation globalpru_small GlobalPru.md --compare GlobalPru
by_validation globalpru_coloured GlobalPru.md --compare GlobalPru
by_validation pacs_128 SFP.md --compare SFP best
by_validation pacs_small SFP.md --compare "SFP (sparsity=0.5)" --exclude "EVIL (sparsity=0.3)" "MRM (sparsity=0.3)" \
  "Magnitude (sparsity=0.3)" "Random (sparsity=0.3)" "SFP (sparsity=0.3)" \
  "SFP (channel_score=unflagged, flag_threshold=class, removal=none, sparsity=0.3)" "SFPWeighted (sparsity=0.3)" \
  "SFPWeighted (sparsity=0.5)" "SparseIRM (sparsity=0.3)" "Taylor (sparsity=0.3)"
by_validation pacs_small SFP_30.md --compare "SFP (sparsity=0.3)" --exclude "EVIL (sparsity=0.5)" "MRM (sparsity=0.5)" \
  "Magnitude (sparsity=0.5)" "Random (sparsity=0.5)" "SFP (sparsity=0.5)" \
  "SFP (channel_score=unflagged, flag_threshold=class, removal=none, sparsity=0.5)" "SFPWeighted (sparsity=0.3)" \
  "SFPWeighted (sparsity=0.5)" "SparseIRM (sparsity=0.5)" "Taylor (sparsity=0.5)"
for budget in "digits 0.1566 3" "digits 0.264 4" "small 0.1651 3" "small 0.2714 4"; do
  set -- $budget
  by_validation "quantization_$1" "DQMQ_$3bit.md" --compare "DQMQ (target_bitops=$2)" \
    "StaticMixedPrecision (target_bitops=$2)" "UniformQuant (bits=$3)" "UniformQuant (bits=$3, quantize_start=0.1)"
done
for budget in "digits 0.2103" "small 0.2182"; do
  set -- $budget
  by_validation "quantization_$1" DQMQ_between.md --compare "DQMQ (target_bitops=$2)" "StaticMixedPrecision (target_bitops=$2)"
done

by_validation coloured_fresh front.png --plot fronts
by_validation pacs_128 front.png --plot fronts
by_validation sparsity_curves curves.png --plot curves
by_validation sparsity_curves_pacs curves.png --plot curves
for sweep in quantization_digits quantization_small; do
  by_validation $sweep front.png --plot fronts
  degraded=results/$sweep/degraded
  domainbed-sfp degraded --input_dir results/$sweep --output $degraded.md --csv $degraded.csv --plot $degraded.png
done
rankings=results/globalpru_coloured/rankings
domainbed-sfp rankings --input_dir results/globalpru_coloured --output $rankings.csv --plot $rankings.png
for benchmark in one_shot_pacs allocations_digits; do
  found=results/benchmarks/$benchmark
  python "benchmarks/${benchmark%_*}.py" report $found.jsonl --output $found.md
done

python results/pages/readme.py
