#!/bin/sh
# Every page, figure and CSV of this folder that is made of records here, anew: `sh results/pages.sh` in the checkout's root
# (pip install -e '.[plots]').
set -eu
tables() { domainbed-sfp collect --input_dir "results/$1" --output "results/$1.md"; }
compared() { # page, sweep, what is compared ...
  page=$1 sweep=$2
  shift 2
  domainbed-sfp collect --input_dir "results/$sweep" --selection training-domain --output "results/$page.md" --compare "$@"
}
plot() { domainbed-sfp collect --input_dir "results/$1" --selection training-domain --plot "$2" --output "results/$3.png"; }

for sweep in ablations closed_digits coloured coloured_70 coloured_digits coloured_digits_search coloured_fresh coloured_search \
  globalpru_coloured globalpru_small pacs_small recipe_pacs quantization_digits quantization_small sparsity_curves sparsity_curves_pacs; do
  tables $sweep
done

python benchmarks/one_shot.py report results/one_shot_pacs.jsonl --output results/one_shot_pacs.md
compared closed_digits_SFP closed_digits SFP best
compared coloured_SFP coloured SFP best --exclude SFP SFPWeighted
compared coloured_SFPWeighted coloured SFPWeighted best --exclude SFP SFPWeighted
compared coloured_70_SFP coloured_70 SFP best --exclude SFP SFPWeighted
compared coloured_70_SFPWeighted coloured_70 SFPWeighted best --exclude SFP SFPWeighted
compared coloured_fresh_SFP coloured_fresh SFP
compared coloured_fresh_SFPWeighted coloured_fresh SFPWeighted
compared coloured_digits_search_SFP coloured_digits_search SFP --exclude SFPWeighted
domainbed-sfp collect --input_dir results/coloured_digits_search --selection training-domain --chosen \
  --output results/coloured_digits_search_chosen.md
domainbed-sfp collect --input_dir results/coloured_search --selection training-domain --chosen --output results/coloured_search_chosen.md
compared globalpru_small_GlobalPru globalpru_small GlobalPru
compared globalpru_coloured_GlobalPru globalpru_coloured GlobalPru
compared pacs_small_SFP pacs_small "SFP (sparsity=0.5)" --exclude "EVIL (sparsity=0.3)" "MRM (sparsity=0.3)" \
  "Magnitude (sparsity=0.3)" "Random (sparsity=0.3)" "SFP (sparsity=0.3)" \
  "SFP (channel_score=unflagged, flag_threshold=class, removal=none, sparsity=0.3)" "SFPWeighted (sparsity=0.3)" \
  "SFPWeighted (sparsity=0.5)" "SparseIRM (sparsity=0.3)" "Taylor (sparsity=0.3)"
compared pacs_small_30_SFP pacs_small "SFP (sparsity=0.3)" --exclude "EVIL (sparsity=0.5)" "MRM (sparsity=0.5)" \
  "Magnitude (sparsity=0.5)" "Random (sparsity=0.5)" "SFP (sparsity=0.5)" \
  "SFP (channel_score=unflagged, flag_threshold=class, removal=none, sparsity=0.5)" "SFPWeighted (sparsity=0.3)" \
  "SFPWeighted (sparsity=0.5)" "SparseIRM (sparsity=0.5)" "Taylor (sparsity=0.5)"
for budget in "digits 0.1566 3" "digits 0.264 4" "small 0.1651 3" "small 0.2714 4"; do
  set -- $budget
  compared "quantization_$1_DQMQ_$3bit" "quantization_$1" "DQMQ (target_bitops=$2)" \
    "StaticMixedPrecision (target_bitops=$2)" "UniformQuant (bits=$3)" "UniformQuant (bits=$3, quantize_start=0.1)"
done
for budget in "digits 0.2103" "small 0.2182"; do
  set -- $budget
  compared "quantization_$1_DQMQ_between" "quantization_$1" "DQMQ (target_bitops=$2)" "StaticMixedPrecision (target_bitops=$2)"
done

plot coloured_fresh fronts coloured_fresh_front
plot sparsity_curves curves sparsity_curves
plot sparsity_curves_pacs curves sparsity_curves_pacs
for sweep in quantization_digits quantization_small; do
  plot $sweep fronts ${sweep}_front
  domainbed-sfp degraded --input_dir results/$sweep --output results/${sweep}_degraded.md --csv results/${sweep}_degraded.csv \
    --plot results/${sweep}_degraded.png
done
domainbed-sfp rankings --input_dir results/globalpru_coloured --output results/globalpru_rankings.csv \
  --plot results/globalpru_rankings.png
python benchmarks/allocations.py report results/allocations_digits.jsonl --output results/allocations_digits.md

python results/pages/readme.py
