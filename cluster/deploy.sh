#!/usr/bin/env bash
# deploy.sh NAME [--dry-run] [--set KEY=VALUE]... [--component NAME]... [--namespace NS] [--wait]
#
# Puts a profile (a folder of cluster/profiles) on the cluster of kubectl's current context.
#
#   --dry-run    print the manifests and touch no cluster
#   --set        image.registry=ADDRESS  where the images baton-frontend, baton-vllm and baton-sglang are
#                image.tag=TAG           which ones
#                serve.PATH=VALUE        a value of the Serve config, for example serve.models.0.decode.replicas=2
#   --component  a folder of cluster/components
#   --namespace  by default BATON_NAMESPACE, or baton
#   --wait       until it is ready, for half an hour at most
#
# Run again, it brings everything to what the profile and these options say; what scale.sh changed is then undone.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

name="" dry_run="" wait="" registry="" tag="" changes=() components=()

read_setting() {
    local value=${1#*=}
    case $1 in
        image.registry=*) require_value "--set $1" "$value" && registry=$value ;;
        image.tag=*) require_value "--set $1" "$value" && tag=$value ;;
        serve.?*=*) changes+=("${1#serve.}") && return ;;
        *) usage_error "--set $1: KEY=VALUE, please, where KEY is image.registry, image.tag or serve.PATH" ;;
    esac
    [[ $value != *[!A-Za-z0-9._:/-]* ]] || usage_error "--set $1: '$value' is no part of an image's name"
}

while (($#)); do
    case $1 in
        -h | --help) usage && exit ;;
        --dry-run) dry_run=yes && shift ;;
        --wait) wait=yes && shift ;;
        --set) require_value "$@" && read_setting "$2" && shift 2 ;;
        --component) require_value "$@" && components+=("$2") && shift 2 ;;
        --namespace) require_value "$@" && namespace=$2 && shift 2 ;;
        -*) usage_error "there is no option $1" ;;
        *) [[ -z $name ]] || usage_error "one NAME, please, not '$name' and '$1'"
            name=$1 && shift ;;
    esac
done

# folders OF: the names of the folders with a kustomization in cluster/OF.
folders() {
    local file
    for file in "$here/$1"/*/kustomization.yaml; do
        [[ ! -e $file ]] || printf ' %s' "$(basename "$(dirname "$file")")"
    done
}

require_folder() { [[ -e $here/$2/$3/kustomization.yaml && $3 != */* ]] || usage_error "there is no $1 '$3'; there are:$(folders "$2")"; }

[[ -n $name ]] || usage_error "NAME is missing; there are: local$(folders profiles)"
[[ $name != local ]] || usage_error "local is this machine: run 'make run'"
require_folder profile profiles "$name"
for component in ${components[@]+"${components[@]}"}; do require_folder component components "$component"; done
require_name --namespace "$namespace"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# render: the manifests, made from a copy: so the Serve config can be another, and kustomize has its relative folders.
render() {
    cp -R "$here" "$work/cluster"
    edit_serve_config
    mkdir "$work/overlay"
    write_kustomization >"$work/overlay/kustomization.yaml"
    kubectl kustomize "$work/overlay"
}

edit_serve_config() {
    local file=$work/cluster/profiles/$name/serve_config.yaml baton
    ((${#changes[@]})) || return 0
    baton=$(baton_command)
    env -u MODEL "$baton" edit "$file" "${changes[@]}" >"$work/serve_config.yaml"
    mv "$work/serve_config.yaml" "$file"
}

write_kustomization() {
    local component image
    printf 'apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nnamespace: "%s"\n' "$namespace"
    printf 'resources:\n  - ../cluster/profiles/%s\ncomponents:\n' "$name"
    for component in ${components[@]+"${components[@]}"}; do printf '  - ../cluster/components/%s\n' "$component"; done
    printf 'images:\n'
    for image in baton-frontend baton-vllm baton-sglang; do
        printf '  - name: %s\n' "$image"
        [[ -z $registry ]] || printf '    newName: "%s/%s"\n' "$registry" "$image"
        [[ -z $tag ]] || printf '    newTag: "%s"\n' "$tag"
    done
}

# manifests JSONPATH: what the manifests say there. A patch that changes nothing has kubectl read them without a cluster.
manifests() { kubectl patch --local --type=merge --patch='{}' --filename="$work/manifests" --output="jsonpath=$1"; }

# values KEY: what stands behind KEY anywhere in the manifests, each once.
values() { manifests "{range ..${1//./\\.}}{@}{\"\n\"}{end}" | sort -u; }

# A component patches worker groups by name; one that a profile does not have becomes a group with nothing but the patch.
check_groups() {
    local groups group parameters
    groups=$(manifests '{range ..workerGroupSpecs[*]}{.groupName} {.rayStartParams}{"\n"}{end}')
    while read -r group parameters; do
        [[ -z $group || -n $parameters ]] || die "a component of '${components[*]}' is for profiles with the worker groups prefill and" \
            "decode, and '$name' has no group '$group'"
    done <<<"$groups"
}

check_placeholders() {
    local found
    found=$(values image | grep '^baton-' || true)
    [[ -z $found ]] || die "image '${found%%$'\n'*}' has no registry: add --set image.registry=ADDRESS"
    found=$(values image | grep -E '/baton-[a-z]+$' || true)
    [[ -z $found ]] || die "image '${found%%$'\n'*}' has no tag: add --set image.tag=TAG"
    found=$(grep -Eo '.*(REGISTRY|ACCOUNT_ID|CERTIFICATE_ID|REDIS_ADDRESS).*' "$work/manifests" || true)
    [[ -z $found ]] || die "a placeholder is left in cluster/, put your own value there:$(last_line "$found" | tr -s ' ')"
}

check_nodes() {
    local pool missing="" pools
    pools=$(values karpenter.sh/nodepool)
    for pool in $pools; do
        kubectl get "nodepools.karpenter.sh/$pool" >/dev/null 2>&1 && continue
        [[ -n $(kubectl get nodes --selector="karpenter.sh/nodepool=$pool" --output=name) ]] || missing+=" $pool"
    done
    [[ -z $missing ]] || die "no node is labelled karpenter.sh/nodepool, nor is there a Karpenter NodePool, for:$missing" \
        "(cluster/karpenter has them)"
    [[ -z $pools && -n $(values nvidia.com/gpu) ]] || return 0
    [[ -n $(kubectl get nodes --output='jsonpath={.items[*].status.allocatable.nvidia\.com/gpu}' | tr -d ' 0') ]] ||
        die "no node has a GPU to give (nvidia.com/gpu): is NVIDIA's device plugin installed?"
}

check_storage() {
    local default='{range .items[?(@.metadata.annotations.storageclass\.kubernetes\.io/is-default-class=="true")]}{.metadata.name}{end}'
    [[ -n $(manifests "{..volumeClaimTemplates}") ]] || return 0
    [[ -n $(kubectl get storageclasses.storage.k8s.io --output="jsonpath=$default") ]] ||
        die "no StorageClass is the default, which Redis' volume asks for: make one the default, or add --component redis-external"
}

# make_keys: the command that makes an admin's key, and the file of keys with its hash.
make_keys() {
    # shellcheck disable=SC2016  # whoever runs it expands them
    printf '%s; kubectl --namespace %s %s' \
        "secret 'baton-keys' is missing: key=baton-\$(openssl rand -hex 32)" "$namespace" \
        'create secret generic baton-keys --from-literal=admin-key="$key" --from-literal=keys.yaml="$(printf "tenants:\n- name: operators\n  admin: true\n  keys:\n  - %s" "$(printf %s "$key" | openssl dgst -sha256 -r | cut -c-64)")"'
}

check_secrets() {
    local secrets secret key optional value missing=""
    secrets=$(
        manifests '{range ..secretKeyRef}{.name} {.key} {.optional}{"\n"}{end}{range ..secret}{.secretName} {"\n"}{end}' | sort -u
    ) || return
    while read -r secret key optional; do
        [[ -n $secret && $optional != true ]] || continue
        k get "secret/$secret" >/dev/null 2>&1 && continue
        missing=yes
        case $secret in
            baton-keys) say "$(make_keys)" && continue ;;
            hf-token) value='YOUR_HUGGING_FACE_TOKEN' ;;
            baton-redis) value="\"\$(head -c 24 /dev/urandom | base64)\"" ;;
            *) value=VALUE ;;
        esac
        say "secret '$secret' is missing: kubectl --namespace $namespace create secret generic $secret --from-literal=$key=$value"
    done <<<"$secrets"
    [[ -z $missing ]]
}

require_kubectl
render >"$work/manifests"
((! ${#components[@]})) || check_groups
if [[ -n $dry_run ]]; then
    cat "$work/manifests"
    exit
fi
check_placeholders
require_cluster
require_kuberay
check_nodes
check_storage
kubectl get "namespace/$namespace" >/dev/null 2>&1 || kubectl create namespace "$namespace"
check_secrets || exit 1
kubectl apply --server-side --field-manager=baton --force-conflicts --filename="$work/manifests"
[[ -z $wait ]] || wait_until_ready "$name" 1800
cat <<NEXT

Next:
  BATON_NAMESPACE=$namespace $here/test.sh $name     waits until it serves, then checks that it does
  kubectl label namespace CLIENTS baton.io/client=true     lets its pods send requests, as those of $namespace may
  kubectl --namespace $namespace port-forward service/$name-head-svc 8265     Ray's dashboard, at http://127.0.0.1:8265; its token:
  kubectl --namespace $namespace get secret CLUSTER --output=jsonpath={.data.auth_token} | base64 -d     CLUSTER: kubectl get rayclusters
NEXT
