// Calls a server in each way that a user does, compares every answer byte by byte, and prints the outcomes as JSON.
//
// verify ADDRESS FOLDER CALLS [AUTHORITY.pem]. grpc-go 1.33 or later; it compresses by gzip only.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"io/ioutil"
	"math/rand"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/encoding/gzip"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

const service = "/inference.GRPCInferenceService/"
const patience = time.Minute

var mark = []byte("########") // where a call's id goes

type bytesCodec struct{}

func (bytesCodec) Marshal(v interface{}) ([]byte, error) { return *v.(*[]byte), nil }
func (bytesCodec) Unmarshal(data []byte, v interface{}) error {
	*v.(*[]byte) = data
	return nil
}
func (bytesCodec) Name() string { return "proto" }

var (
	lock    sync.Mutex
	found   = map[string]map[string]int{}
	files   = map[string][]byte{}
	ids     = int64(30000000)
	channel *grpc.ClientConn
	small   = []string{"small0", "small1", "small2", "small3", "small4", "small5", "small6", "small7"}
	large   = []string{"large4", "large8", "large16"}
)

func note(check, outcome string) {
	lock.Lock()
	defer lock.Unlock()
	if found[check] == nil {
		found[check] = map[string]int{}
	}
	found[check][outcome]++
}

func noteEnd(check string, err error) { note(check, strconv.Itoa(int(status.Code(err)))) }

func wanted(name, answer string) (request, response []byte) {
	id := []byte(strconv.FormatInt(atomic.AddInt64(&ids, 1), 10))
	return bytes.Replace(files[name+".request"], mark, id, 1), bytes.Replace(files[name+"."+answer], mark, id, 1)
}

func withMetadata(timeout time.Duration) (context.Context, context.CancelFunc) {
	all := make([]byte, 256)
	for i := range all {
		all[i] = byte(i)
	}
	outgoing := metadata.AppendToOutgoingContext(context.Background(), "x-trace", "a b,c", "x-token-bin", string(all))
	return context.WithTimeout(outgoing, timeout)
}

func unary(check, name string, timeout, cancelAfter time.Duration, options ...grpc.CallOption) {
	request, response := wanted(name, "response")
	limited, cancel := withMetadata(timeout)
	defer cancel()
	if cancelAfter >= 0 {
		time.AfterFunc(cancelAfter, cancel)
	}
	var answer []byte
	options = append(options, grpc.ForceCodec(bytesCodec{}))
	if err := channel.Invoke(limited, service+"ModelInfer", &request, &answer, options...); err != nil {
		noteEnd(check, err)
	} else if bytes.Equal(answer, response) {
		note(check, "answered")
	} else {
		note(check, "wrong")
	}
}

func stream(check string, names []string) {
	limited, cancel := withMetadata(patience)
	defer cancel()
	both := &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}
	call, err := channel.NewStream(limited, both, service+"ModelStreamInfer", grpc.ForceCodec(bytesCodec{}))
	if err != nil {
		noteEnd(check, err)
		return
	}
	requests, responses := [][]byte{}, [][]byte{}
	for _, name := range names {
		request, response := wanted(name, "streamed")
		requests, responses = append(requests, request), append(responses, response)
	}
	go func() {
		for i := range requests {
			if call.SendMsg(&requests[i]) != nil {
				return // RecvMsg has the reason
			}
		}
		call.CloseSend()
	}()
	for i := 0; ; i++ {
		var answer []byte
		if err := call.RecvMsg(&answer); err == io.EOF && i == len(responses) {
			return
		} else if err != nil {
			noteEnd(check, err)
			return
		}
		if i < len(responses) && bytes.Equal(answer, responses[i]) {
			note(check, "answered")
		} else {
			note(check, "wrong")
		}
	}
}

func sideBySide(jobs []func(), threads int) {
	queue := make(chan func(), len(jobs))
	for _, job := range jobs {
		queue <- job
	}
	close(queue)
	var all sync.WaitGroup
	for i := 0; i < threads; i++ {
		all.Add(1)
		go func() {
			defer all.Done()
			for job := range queue {
				job()
			}
		}()
	}
	all.Wait()
}

func smallCalls(check string, count int, options ...grpc.CallOption) (jobs []func()) {
	for i := 0; i < count; i++ {
		name := small[i%8]
		jobs = append(jobs, func() { unary(check, name, patience, -1, options...) })
	}
	return
}

func main() {
	calls, _ := strconv.Atoi(os.Args[3])
	paths, _ := filepath.Glob(filepath.Join(os.Args[2], "*.*"))
	for _, path := range paths {
		files[filepath.Base(path)], _ = ioutil.ReadFile(path)
	}
	security := grpc.WithInsecure()
	if len(os.Args) > 4 {
		authority, err := credentials.NewClientTLSFromFile(os.Args[4], "")
		if err != nil {
			panic(err)
		}
		security = grpc.WithTransportCredentials(authority)
	}
	var err error
	channel, err = grpc.Dial(os.Args[1], security, grpc.WithBlock(), grpc.WithDefaultCallOptions(
		grpc.MaxCallRecvMsgSize(1<<30), grpc.MaxCallSendMsgSize(1<<30)))
	if err != nil {
		panic(err)
	}
	gzipped := grpc.UseCompressor(gzip.Name)
	sideBySide(smallCalls("unary", calls), 8)
	sideBySide(append(smallCalls("gzip", calls/4, gzipped), func() { unary("gzip", "large4", patience, -1, gzipped) }), 8)
	jobs := []func(){}
	for i := 0; i < 9; i++ {
		name := large[i%3]
		jobs = append(jobs, func() { unary("large", name, patience, -1) })
	}
	sideBySide(jobs, 3)
	jobs = nil
	names := []string{}
	for i := 0; i < calls/4; i++ {
		names = append(names, small[i%8])
	}
	for i := 0; i < 4; i++ {
		jobs = append(jobs, func() { stream("stream", names) })
	}
	sideBySide(jobs, 4)
	largeStream := func() { stream("large stream", append(large, large...)) }
	if files["large4.streamed"] != nil {
		sideBySide([]func(){largeStream, largeStream}, 2)
	}
	jobs = smallCalls("beside deadlines", 80)
	for i := 0; i < 40; i++ {
		jobs = append(jobs, func() { unary("deadlines", "slow", time.Duration(1e6+rand.Intn(19e6)), -1) })
	}
	rand.Shuffle(len(jobs), func(i, j int) { jobs[i], jobs[j] = jobs[j], jobs[i] })
	sideBySide(jobs, 8)
	jobs = smallCalls("beside cancels", 80)
	for i := 0; i < 120; i++ {
		name, after := []string{"slow", "large4", "small0"}[i%3], time.Duration(i%6)*time.Millisecond
		jobs = append(jobs, func() { unary("cancels", name, patience, after) })
	}
	rand.Shuffle(len(jobs), func(i, j int) { jobs[i], jobs[j] = jobs[j], jobs[i] })
	sideBySide(jobs, 8)
	for _, words := range [][]string{
		{"missing model", "missing", "ModelInfer"},
		{"missing method", "missing", "NoMethod"},
		{"oversized", "oversized", "ModelInfer"},
	} {
		request := files[words[1]+".request"]
		var answer []byte
		bytesOnly := grpc.ForceCodec(bytesCodec{})
		noteEnd(words[0], channel.Invoke(context.Background(), service+words[2], &request, &answer, bytesOnly))
	}
	sideBySide(smallCalls("after all", 80), 8)
	channel.Close()
	said, _ := json.Marshal(found)
	fmt.Println(string(said))
}
