#!/usr/bin/env bash
# scale.sh NAME POOL=N | POOL=MIN..MAX ... [--model MODEL] [--namespace NS]
#
# Changes how many replicas the pools of a running application have; nothing restarts.
#
#   NAME         a RayService, or local: what `make run` serves here
#   POOL         frontend, prefill, decode or aggregated; N is fixed, between MIN and MAX autoscaling chooses
#   --model      whose pools, where there are several models
#   --namespace  by default BATON_NAMESPACE, or baton
#
#   scale.sh sglang-disaggregated-default prefill=3 decode=2..6
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

name="" targets=() model=baton # an application of one model goes by its own name too
while (($#)); do
    case $1 in
        -h | --help) usage && exit ;;
        --model) require_value "$@" && model=$2 && shift 2 ;;
        --namespace) require_value "$@" && namespace=$2 && shift 2 ;;
        -*) usage_error "there is no option $1" ;;
        *=*) [[ $1 =~ ^[^=]+=[0-9]+(\.\.[0-9]+)?$ ]] || usage_error "'$1': say POOL=N or POOL=MIN..MAX"
            targets+=("$1") && shift ;;
        *) [[ -z $name ]] || usage_error "one NAME, please, not '$name' and '$1'"
            name=$1 && shift ;;
    esac
done
[[ -n $name ]] || usage_error "NAME is missing"
((${#targets[@]})) || usage_error "POOL=N is missing"

if [[ $name == local ]]; then
    baton=$(baton_command)
    exec "$baton" scale "$model" "${targets[@]}"
fi
require_name NAME "$name"
require_name --namespace "$namespace"
require_rayservice "$name"

# Ray adds no nodes beyond a worker group's maxReplicas: replicas above it would wait for ever.  The RayService may say
# another number than its running cluster has: KubeRay does not hand that one on.
check_groups() {
    local group most target
    while read -r group most; do
        for target in "${targets[@]}"; do
            [[ ${target%%=*} != "$group" || ${target##*[=.]} -le $most ]] ||
                die "$target: worker group '$group' of RayService '$name' has maxReplicas $most, and a node for each" \
                    "replica is wanted: raise it in the profile for clusters to come, and in this one by" \
                    "'kubectl --namespace $namespace edit rayclusters.ray.io'"
        done
    done < <(k get "rayclusters.ray.io/$(active_cluster "$name")" \
        --output='jsonpath={range .spec.workerGroupSpecs[*]}{.groupName}{" "}{.maxReplicas}{"\n"}{end}')
}

# A ConfigMap that is sent nowhere: so kubectl writes the file as a string in JSON.
write_patch() {
    local data
    data=$(kubectl create configmap patch --dry-run=client --from-file=serveConfigV2="$work/after" --output='jsonpath={.data}')
    printf '{"spec": %s}\n' "$data"
}

pod=$(head_pod "$name")
check_groups
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
rayservice "$name" '{.spec.serveConfigV2}' >"$work/before"
in_head "$pod" baton scale "$model" --file - "${targets[@]}" <"$work/before" >"$work/after"
write_patch >"$work/patch.json"
k patch "rayservices.ray.io/$name" --type=merge --field-manager=baton --patch-file="$work/patch.json"
say "asked for; 'kubectl --namespace $namespace exec $pod --container=ray-head -- baton status' shows when it is so"
