#!/usr/bin/env bash
# delete.sh NAME [--all] [--yes] [--namespace NS]
#
# Takes away what deploy.sh put on the cluster for NAME, and waits until its pods are gone.  The namespace stays, with
# what profiles share: secrets, environment, the model cache.
#
#   --all        the namespace too, with all that is in it
#   --yes        do not ask
#   --namespace  by default BATON_NAMESPACE, or baton
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

name="" all="" yes=""
while (($#)); do
    case $1 in
        -h | --help) usage && exit ;;
        --all) all=yes && shift ;;
        --yes) yes=yes && shift ;;
        --namespace) require_value "$@" && namespace=$2 && shift 2 ;;
        -*) usage_error "there is no option $1" ;;
        *) [[ -z $name ]] || usage_error "one NAME, please, not '$name' and '$1'"
            name=$1 && shift ;;
    esac
done
[[ -n $name ]] || usage_error "NAME is missing"
[[ $name != local ]] || usage_error "local is this machine: Ctrl-C ends 'make run'"
require_name NAME "$name"
require_name --namespace "$namespace"
require_cluster

# The namespaced kinds in cluster/ that stand for themselves; secrets and volumes stay.
KINDS='rayservices.ray.io statefulsets.apps services configmaps serviceaccounts poddisruptionbudgets.policy
    networkpolicies.networking.k8s.io ingresses.networking.k8s.io gateways.gateway.networking.k8s.io
    httproutes.gateway.networking.k8s.io podmonitors.monitoring.coreos.com servicemonitors.monitoring.coreos.com
    prometheusrules.monitoring.coreos.com'
DELETE_TIMEOUT_S=900

# find_objects: what deploy.sh applied, as far as this cluster has its kinds.
find_objects() {
    local known kind kinds=""
    known=" $( (kubectl api-resources --namespaced --verbs=list,delete --output=name || true) | tr '\n' ' ')"
    for kind in $KINDS; do [[ $known != *" $kind "* ]] || kinds+=,$kind; done
    k get "${kinds#,}" --selector="baton.io/service=$name" --output=name
}

# of_pods JSONPATH: a line for each pod.
of_pods() { k get pods --selector="baton.io/service=$name" --output="jsonpath={range .items[*]}$1{\"\n\"}{end}"; }

# karpenters_nodes: those of its nodes that the pods run on, with their pool.
karpenters_nodes() {
    local node pool
    for node in $(of_pods '{.spec.nodeName}' | sort -u); do
        pool=$(kubectl get "node/$node" --output='jsonpath={.metadata.labels.karpenter\.sh/nodepool}')
        [[ -z $pool ]] || printf '  %s (%s)\n' "$node" "$pool"
    done
}

require_only_service() {
    local others
    others=$(k get rayservices.ray.io --output=name | grep -Fxv "rayservice.ray.io/$name" || true)
    [[ -z $others ]] || die "namespace '$namespace' has other RayServices, which --all would take along: ${others//$'\n'/, }"
}

confirm() {
    local answer
    [[ -z $yes ]] || return 0
    [[ -t 0 ]] || usage_error "say --yes: there is no terminal to ask at"
    read -r -p "Delete this? [y/N] " answer
    [[ $answer == [yY]* ]] || die "nothing was deleted"
}

# wait_until_none COMMAND...: until it prints nothing.
wait_until_none() {
    local deadline=$((SECONDS + DELETE_TIMEOUT_S)) left
    until left=$("$@") && [[ -z $left ]]; do
        ((SECONDS < deadline)) || die "still there after $DELETE_TIMEOUT_S s: ${left//$'\n'/, }"
        sleep "$poll_s"
    done
}

# Before the rest: when a Ray cluster goes, KubeRay empties its Redis.
delete_service() {
    k delete "rayservices.ray.io/$name" --wait=false
    wait_until_none k get rayclusters.ray.io --selector="ray.io/originated-from-cr-name=$name" --output=name
}

objects=$(find_objects)
[[ -z $all ]] || require_only_service
[[ -n $objects || -n $all ]] || die "there is nothing of '$name' in namespace '$namespace'"
nodes=$(karpenters_nodes)
printf '%s\n' ${objects:+"$objects"} ${all:+"namespace/$namespace, with its secrets and volumes"}
confirm
[[ $objects != *rayservice.ray.io/* ]] || delete_service
objects=$(find_objects)
[[ -z $objects ]] || xargs kubectl --namespace "$namespace" delete --wait=false <<<"$objects"
wait_until_none of_pods '{.metadata.name}'
[[ -z $all ]] || kubectl delete "namespace/$namespace"
say "no pod of '$name' is left"
[[ -z $nodes ]] || printf 'Karpenter removes these nodes if nothing else runs on them:\n%s\n' "$nodes"
