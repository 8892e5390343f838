# What the three scripts share; source it with the folder of the rows.
set -euo pipefail
out=${1:?"usage: $0 OUT"}
mkdir -p "$out"
out=$(cd "$out" && pwd)
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 PYTHONUNBUFFERED=1
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PYTHONPATH="$here/../..:$out/site${PYTHONPATH:+:$PYTHONPATH}"
python3 "$here/entry_points.py" "$out/site"
model=$out/model
flags=${FLAGS:---load-format dummy --attention-backend triton --sampling-backend pytorch
  --mem-fraction-static 0.8 --cuda-graph-backend-prefill disabled --cuda-graph-max-bs-decode 16}
[ -e "$model/config.json" ] || python3 "$here/model.py" "$model"
