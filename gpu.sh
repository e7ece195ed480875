set -e
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .whl/*.whl; export PYTHONPATH=/tmp/site:.
nvidia-smi --query-gpu=name --format=csv; nproc; python3 -c "import torch,timm,transformers;print(torch.__version__,timm.__version__,transformers.__version__)"
export OMP_NUM_THREADS=1
t0=$(date +%s)
python3 -m dmllm.cli data make scenes --num ${NUM:-400000} --split train --out runs/data/scenes-train
echo data $(( $(date +%s)-t0 ))s
python3 -m dmllm.cli data make scenes --num 1000 --split val --out runs/data/scenes-val
python3 -m dmllm.cli tokenizer train runs/data/scenes-val/data.json --vocab-size 512 --isolate '[A-Z0-9]' --out runs/tokenizer
du -sh runs/data/scenes-train/data.json
