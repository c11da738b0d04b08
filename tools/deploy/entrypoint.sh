#!/bin/sh
# Starts the server in a container, with the model and the port where each cloud puts them; its arguments go to jaxlm serve.
#   model    $JAXLM_WORKDIR, Azure ML's $AZUREML_MODEL_DIR, SageMaker's /opt/ml/model, or /model: a run's folder, or a folder that holds one
#   port     Vertex AI's $AIP_HTTP_PORT, Cloud Run's $PORT, or 8080
#   key      $JAXLM_API_KEY; JAXLM_OPEN=1 instead where a cloud service in front asks who it is (SageMaker, Vertex AI, Azure ML)
set -eu
if [ "${1:-}" = serve ]; then shift; fi # SageMaker runs: docker run IMAGE serve

model=
for place in "${JAXLM_WORKDIR:-}" "${AZUREML_MODEL_DIR:-}" "${JAXLM_ROOT:-}/opt/ml/model" "${JAXLM_ROOT:-}/model"; do
  for folder in "$place" "$place"/*; do
    if [ -z "$model" ] && [ -n "$place" ] && [ -d "$folder/checkpoints" ]; then model=$folder; fi
  done
done
if [ -z "$model" ]; then
  echo "no run is in \$JAXLM_WORKDIR, \$AZUREML_MODEL_DIR, /opt/ml/model or /model: mount a folder that jaxlm train or jaxlm import made" >&2
  exit 2
fi
if [ "${JAXLM_OPEN:-}" = 1 ]; then set -- --open "$@"; fi
exec jaxlm serve --workdir="$model" --host=0.0.0.0 --port="${AIP_HTTP_PORT:-${PORT:-8080}}" --name="${JAXLM_NAME:-model}" "$@"
