# shellcheck shell=bash
# What deploy.sh, test.sh, scale.sh and delete.sh share; they source it.  It needs bash and kubectl, nothing else.

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repository=$(dirname "$here")
program=$(basename "$0")
namespace=${BATON_NAMESPACE:-baton}
poll_s=${BATON_POLL_S:-5}

# The comment at the top of a script is its usage.
usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; }

say() { printf '%s: %s\n' "$program" "$*" >&2; }

die() {
    say "$@"
    exit 1
}

usage_error() {
    say "$* ($program -h says how)"
    exit 2
}

# require_value OPTION [VALUE]: that an option's value is there.
require_value() { [[ $# -gt 1 && -n $2 ]] || usage_error "$1 needs a value"; }

# require_name WHAT NAME: a name as Kubernetes has them, so that it can stand in selectors and YAML as it is.
require_name() {
    local pattern='^[a-z0-9]([-a-z0-9]*[a-z0-9])?$'
    [[ $2 =~ $pattern ]] || usage_error "$1 '$2' is no name of Kubernetes: lower-case letters, digits and - only"
}

# Kubernetes' part of an error message of kubectl's: its last line.
last_line() { printf '%s' "${1##*$'\n'}"; }

k() { kubectl --namespace "$namespace" "$@"; }

# baton_command: where `baton` is on this machine.
baton_command() {
    if [[ -x $repository/.venv/bin/baton ]]; then
        printf '%s\n' "$repository/.venv/bin/baton"
    else
        command -v baton || die "baton is not installed here: run 'make setup', or have it on PATH"
    fi
}

require_kubectl() {
    command -v kubectl >/dev/null || die "kubectl is not on PATH: install it (1.30 or newer)"
}

require_cluster() {
    local context error
    require_kubectl
    context=$(kubectl config current-context 2>/dev/null) ||
        die "kubectl has no current context: 'kubectl config get-contexts' lists them, 'kubectl config use-context NAME' takes one"
    error=$(kubectl get --raw /version --request-timeout=10s 2>&1 >/dev/null) ||
        die "the cluster of context '$context' does not answer: $(last_line "$error")"
}

require_kuberay() {
    local kinds
    kinds=$(kubectl api-resources --api-group=ray.io --output=name || true) # it fails for other groups' sake too
    [[ $kinds == *rayservices.ray.io* ]] || die "the cluster has no RayService (KubeRay): helm install kuberay-operator" \
        "kuberay-operator --repo https://ray-project.github.io/kuberay-helm --version 1.7.0 --namespace kuberay-system" \
        --create-namespace
}

# require_rayservice NAME
require_rayservice() {
    local error
    require_cluster
    require_kuberay
    error=$(k get "rayservices.ray.io/$1" --output=name 2>&1 >/dev/null) ||
        die "there is no RayService '$1' in namespace '$namespace' ('$here/deploy.sh $1' makes it): $(last_line "$error")"
}

# rayservice NAME JSONPATH
rayservice() { k get "rayservices.ray.io/$1" --output="jsonpath=$2"; }

# active_cluster NAME: the RayCluster that serves.
active_cluster() { rayservice "$1" '{.status.activeServiceStatus.rayClusterName}'; }

# head_pod NAME: the head of the cluster that serves; while another is made ready there are two.
head_pod() {
    local cluster pods
    cluster=$(active_cluster "$1")
    [[ -n $cluster ]] || die "RayService '$1' does not serve yet: '$here/test.sh $1' waits until it does"
    pods=$(k get pods --selector="ray.io/node-type=head,ray.io/cluster=$cluster" \
        --field-selector=status.phase=Running --output=name)
    [[ -n $pods ]] || die "the head pod of cluster '$cluster' does not run"
    printf '%s\n' "${pods%%$'\n'*}"
}

# in_head POD COMMAND...: stdin goes to the command.
in_head() {
    local pod=$1
    shift
    k exec --stdin "$pod" --container=ray-head -- "$@"
}

# is_ready NAME: as it was last applied; during an upgrade the cluster before it is Ready all the time.
is_ready() {
    local ready upgrading
    ready=$(rayservice "$1" '{.status.conditions[?(@.type=="Ready")].status} {.status.observedGeneration}')
    upgrading=$(rayservice "$1" '{.status.conditions[?(@.type=="UpgradeInProgress")].status}')
    [[ $ready == "True $(rayservice "$1" '{.metadata.generation}')" && $upgrading != True ]]
}

# wait_until_ready NAME SECONDS: says what is pending whenever that changes.
wait_until_ready() {
    local name=$1 deadline=$((SECONDS + $2)) said="" pending
    until is_ready "$name"; do
        pending=$(describe_pending "$name")
        [[ $pending == "$said" ]] || printf '%s\n' "$pending" >&2
        said=$pending
        ((SECONDS < deadline)) || die "RayService '$name' is not ready after $2 s; above is what it waits for"
        sleep "$poll_s"
    done
}

# shellcheck disable=SC2016  # these are Go's variables
PENDING_SERVICE='{{range .status.conditions}}  {{.type}} {{.status}}{{with .reason}} ({{.}}){{end}}{{with .message}}: {{.}}{{end}}
{{end}}{{range .status.pendingServiceStatus.applicationStatuses}}{{$application := .}}{{range $name, $deployment := .serveDeploymentStatuses}}{{if ne .status "HEALTHY"}}  deployment {{$name}} {{.status}}{{with .message}}: {{.}}{{end}}
{{end}}{{end}}{{with .message}}  {{$application.status}}: {{.}}
{{end}}{{end}}'
# shellcheck disable=SC2016
PENDING_PODS='{{range .items}}{{$ready := "False"}}{{range .status.conditions}}{{if eq .type "Ready"}}{{$ready = .status}}{{end}}{{end}}{{if ne $ready "True"}}  pod {{.metadata.name}} {{.status.phase}}{{range .status.conditions}}{{if eq .type "PodScheduled"}}{{with .message}}: {{.}}{{end}}{{end}}{{end}}{{range .status.containerStatuses}}{{with .state.waiting}}: {{.reason}}{{with .message}} ({{.}}){{end}}{{end}}{{end}}
{{end}}{{end}}'

describe_pending() {
    printf 'RayService %s is not ready:\n' "$1"
    k get "rayservices.ray.io/$1" --output="go-template=$PENDING_SERVICE" || true
    k get pods --selector="baton.io/service=$1" --output="go-template=$PENDING_PODS" || true
}
