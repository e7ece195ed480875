export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1 NUM=400000 PYTHONPATH=/tmp/site:.
T0=$(date +%s); el(){ echo "== $1 at $(( $(date +%s)-T0 ))s"; }
bash gpu.sh 2>&1 | tail -3; 
python3 -m dmllm.cli data make digits --num 1000 --split val --out runs/data/digits-val
python3 -m dmllm.cli tokenizer train runs/data/scenes-val/data.json runs/data/digits-val/data.json --vocab-size 640 --isolate '[A-Z0-9]' --out runs/tokenizer
el data
timeout 90 python3 prof.py 2>&1 | grep -v -i warn | cut -c1-220 > $OUT/prof.txt; grep " ms" $OUT/prof.txt; el prof
timeout -s TERM 330 python3 train.py data_configs/dmllm_tiny.yaml --steps=${STEPS:-2000} --output_dir=/tmp/full --log_every=200 --num_workers=14 --save_every=2000 2>&1 | grep -v "^.*Writing" | tail -30; el train
(cd /tmp/full && tar cf - model metrics.jsonl config.yaml) | split -b 15m - $OUT/full.tar.
python3 -m dmllm.cli data make digits --num 6000 --split train --out runs/demo/digits-train >/dev/null; python3 -m dmllm.cli data make scenes --num 2000 --split train --seed 7 --out runs/demo/scenes-train > /dev/null
ev(){ python3 -m dmllm.cli eval eval/suites/demo.yaml --model $1 --out /tmp/ev_$2 --batch_size=256 --decode.max_new_tokens=32 --decode.threshold=0.9 2>&1 | tail -24; }
i=0; for o in "--steps=700 --batch_size=16" "--steps=350 --batch_size=32 --optimiser.muon_lr=0.01 --optimiser.lr=2e-3" "--steps=1400 --batch_size=8 --optimiser.muon_lr=0.003"; do i=$((i+1)); echo "### $o"; timeout 100 python3 train.py data_configs/demo_digits.yaml --model.checkpoint=/tmp/full/model --output_dir=/tmp/demo$i --num_workers=4 --log_every=100 $o 2>&1 | grep -v Writing | tail -4; ev /tmp/demo$i/model $i; el demo$i; done
