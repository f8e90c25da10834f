#!/usr/bin/env bash
# test.sh NAME [--model MODEL] [--namespace NS] [--timeout SECONDS]
#
# Proves that Baton serves: health, models, chat, streaming, a long prompt through remote prefill, the prefix cache, a
# conversation, structured output, refusals.  Prints TTFT and ITL; the exit code is 0 if all of it passes.
#
#   NAME       a RayService: waits until it is ready, then runs `baton smoke` in its head pod
#              with the admin's key of the secret baton-keys
#              local: the application that `make run` serves here, at BATON_URL (http://127.0.0.1:8000), with BATON_API_KEY
#   --model    only this one of several
#   --timeout  how long to wait until it is ready; 1800, as loading a large model may take 20 minutes
#   --namespace  by default BATON_NAMESPACE, or baton
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

name="" timeout_s=1800 model=""
while (($#)); do
    case $1 in
        -h | --help) usage && exit ;;
        --model) require_value "$@" && model=$2 && shift 2 ;;
        --namespace) require_value "$@" && namespace=$2 && shift 2 ;;
        --timeout) require_value "$@" && timeout_s=$2 && shift 2 ;;
        -*) usage_error "there is no option $1" ;;
        *) [[ -z $name ]] || usage_error "one NAME, please, not '$name' and '$1'"
            name=$1 && shift ;;
    esac
done
[[ -n $name ]] || usage_error "NAME is missing"
[[ $timeout_s =~ ^[0-9]+$ ]] || usage_error "--timeout '$timeout_s' is no number of seconds"

[[ -z $model ]] || set -- --model "$model"
if [[ $name == local ]]; then
    baton=$(baton_command)
    exec "$baton" smoke "${BATON_URL:-http://127.0.0.1:8000}" "$@"
fi
require_name NAME "$name"
require_name --namespace "$namespace"
require_rayservice "$name"
wait_until_ready "$name" "$timeout_s"
pod=$(head_pod "$name")
key=$(k get secret/baton-keys --output='jsonpath={.data.admin-key}' | base64 -d) || exit
# shellcheck disable=SC2016  # the pod expands it
in_head "$pod" bash -c 'read -r BATON_API_KEY; export BATON_API_KEY; exec baton smoke "$@"' - \
    "http://$name-serve-svc:8000" "$@" <<<"$key"
